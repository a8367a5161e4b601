"""Video DiTs that this project did not write, as their packages have them, held against the invariants."""
