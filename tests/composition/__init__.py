"""What runs beside SALAD: the tests behind docs/composition.md that no other folder has."""
