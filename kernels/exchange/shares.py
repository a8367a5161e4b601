"""Which heads, and which of their query blocks, each of the processes has that share a sequence.

H heads and P processes: laid end to end, the heads are cut into P equal parts. If P divides H these are whole heads.
Otherwise a head at a cut belongs to two processes (or more, if there are more processes than heads): each attends with
a part of its query blocks, in the order in which they are numbered.
"""

from __future__ import annotations


def heads_of(place: int, heads: int, processes: int) -> tuple[int, int]:
    """The first head of process `place`, and the one after its last, of all the heads that it has something of."""
    return place * heads // processes, -(-(place + 1) * heads // processes)


def blocks_of(place: int, heads: int, processes: int, head: int, blocks: int) -> tuple[int, int]:
    """The first of a head's `blocks` query blocks that process `place` has, and the one after its last.

    Over all processes they are the blocks of the head, each once.
    """
    cuts = (min(max(cut * heads - head * processes, 0), processes) for cut in (place, place + 1))
    begin, end = (cut * blocks // processes for cut in cuts)
    return begin, end
