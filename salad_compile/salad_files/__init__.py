"""SALAD files: written whole, checked before anything is built, found by path or Hub id."""
