"""The tail on the Gluon engine without a GPU: what it launches. `tests/kernels/gpu/test_gluon.py` runs it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from salad_compile.kernels.aot import specialise
from salad_compile.kernels.block_sparse.gluon_backward import queries_each
from salad_compile.kernels.launch import Launch, interpreting, record_launches
from salad_compile.kernels.layout import block_count
from salad_compile.kernels.pools import Pools
from salad_compile.kernels.selection import Selection
from salad_compile.kernels.tail import gluon

META = torch.device("meta")
BATCH, HEADS, HEAD_DIM = 2, 3, 128

pytestmark = pytest.mark.skipif(interpreting(), reason="Triton cannot interpret Gluon")


def launches(tokens: int = 1001, pools: int = 5, *, backward: bool = False, **options: Any) -> list[Launch]:
    """What one call launches."""
    query_block = options.get("query_block", 128)
    x = torch.empty((BATCH, tokens, HEADS, HEAD_DIM), dtype=torch.bfloat16, device=META).transpose(1, 2)
    means = torch.empty((BATCH, HEADS, pools, HEAD_DIM), dtype=torch.bfloat16, device=META)
    lut = torch.empty(
        (BATCH, HEADS, block_count(tokens, query_block), options.get("kept", 5)), dtype=torch.int32, device=META
    )
    mask = torch.empty((BATCH, tokens), dtype=torch.bool, device=META) if options.get("masked") else None
    selection = Selection(lut, lut.new_empty(lut.shape[:3]), query_block, 64, options.get("scale", 0.125), mask)
    weight = torch.empty(HEADS, device=META) if options.get("weight", True) else None
    pools_of_call = Pools(means, means, torch.empty((*lut.shape[:3], pools), device=META), weight)
    lse = torch.empty((BATCH, HEADS, tokens), device=META)
    with record_launches() as recorded:
        if not backward:
            out, joint = gluon.attend_with_tail(x, x, x, pools_of_call, selection)
            assert (out.shape, joint.shape) == (x.shape, x.shape[:3])
            return recorded
        grads = gluon.attend_with_tail_backward(x, x, x, x, x, lse, pools_of_call, selection)
    assert [grad.shape for grad in grads] == [x.shape] * 3 + [means.shape] * 2 + [(HEADS,)]
    return recorded


def names(recorded: list[Launch]) -> list[str]:
    return [launch.kernel.__name__.removesuffix("_kernel") for launch in recorded]


def test_pools_join_the_launches_of_sparse_attention() -> None:
    assert names(launches()) == ["check_selection", "pool_bias", "gluon_forward", "gluon_forward"]
    assert names(launches(masked=True)) == ["check_selection", "pack_mask", "pool_bias", "gluon_forward"]
    assert all(x.constants["SETTINGS"].pooled for x in launches() if "gluon" in x.kernel.__name__)
    backward = [name for name in names(launches(backward=True)) if "gluon" in name or "bias" in name]
    assert backward == ["pool_bias", "gluon_query_gradient", "gluon_key_gradient", "gluon_pool_gradient"]


def test_a_list_without_a_slot_gets_one() -> None:
    assert [x.arguments[8].shape[-1] for x in launches(kept=0) if "gluon" in x.kernel.__name__] == [1, 1]


@pytest.mark.parametrize("backward", [False, True])
def test_no_length_and_no_scale_is_part_of_a_build(backward: bool) -> None:
    calls: tuple[dict[str, Any], ...] = (
        {},
        {"tokens": 1, "pools": 1},
        {"tokens": 4096, "pools": 64, "kept": 16},
        {"pools": 1000, "scale": -16.0},
    )
    builds = [
        {specialise(x, 90).identity for x in launches(backward=backward, **sizes) if "gluon" in x.kernel.__name__}
        for sizes in calls
    ]
    assert len(builds[0]) == (3 if backward else 2)
    assert all(build == builds[0] for build in builds)


@pytest.mark.parametrize(
    ("query_blocks", "tiles", "processors"), [(256, 24, 132), (590, 200, 132), (1, 2, 132), (3, 1000, 132), (7, 1, 1)]
)
def test_queries_are_split_so_that_the_last_processor_is_done_early(
    query_blocks: int, tiles: int, processors: int
) -> None:
    """Never later than in one part, and no part is empty."""

    def duration(each: int) -> int:
        programs = tiles * block_count(block_count(query_blocks, each), 2)
        return block_count(programs, processors) * each

    each = queries_each(query_blocks, tiles, processors)
    assert duration(each) <= duration(query_blocks)
    assert 0 < each <= query_blocks
    least = tiles * query_blocks / (2 * processors)
    assert duration(each) >= least
