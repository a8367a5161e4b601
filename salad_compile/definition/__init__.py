"""SALAD attention, once, for tensors and for graphs alike."""
