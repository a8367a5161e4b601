"""mass16: as mass8, from means of sixteen tokens, for a quarter of its work (our choice)."""

from salad_compile.definition.patterns.mass8 import CellMass

PATTERN = CellMass("mass16", 16)
