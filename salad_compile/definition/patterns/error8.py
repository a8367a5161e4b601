"""error8: the key blocks of which compensation would get most wrong, from means of 8 tokens (our choice).

As mass8, each block's mass times the spread of its values and of its scores: what a mean of the block cannot show.
"""

from salad_compile.definition.patterns.mass8 import CellMass

PATTERN = CellMass("error8", 8, by_error=True)
