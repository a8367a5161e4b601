"""Which heads and query blocks each process has: all of them once, and no process more than its part."""

from __future__ import annotations

import pytest

from salad_compile.kernels.exchange.shares import blocks_of, heads_of


@pytest.mark.parametrize("heads", [1, 2, 3, 5, 12, 40])
@pytest.mark.parametrize("processes", [1, 2, 3, 4, 7, 8, 16])
@pytest.mark.parametrize("blocks", [1, 3, 256])
def test_every_query_block_is_one_processs(heads: int, processes: int, blocks: int) -> None:
    counted = [[0] * blocks for _ in range(heads)]
    most = 0
    for place in range(processes):
        first, end = heads_of(place, heads, processes)
        assert 0 <= first < end <= heads
        mine = 0
        for head in range(heads):
            begin, last = blocks_of(place, heads, processes, head, blocks)
            assert begin == last or first <= head < end
            mine += last - begin
            for block in range(begin, last):
                counted[head][block] += 1
        most = max(most, mine)
    assert counted == [[1] * blocks] * heads
    # cuts within a head are rounded to whole blocks
    assert most <= heads * blocks / processes + 2


def test_heads_that_divide_are_whole() -> None:
    assert [heads_of(place, 12, 4) for place in range(4)] == [(0, 3), (3, 6), (6, 9), (9, 12)]
    assert [heads_of(place, 3, 2) for place in range(2)] == [(0, 2), (1, 3)]
    assert [blocks_of(place, 3, 2, 1, 10) for place in range(2)] == [(0, 5), (5, 10)]
    assert [blocks_of(place, 3, 2, 2, 10) for place in range(2)] == [(0, 0), (0, 10)]
