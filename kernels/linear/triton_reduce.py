"""The kernel that adds up what the splits of one (batch, head) pair have summed."""

import triton
import triton.language as tl


@triton.jit
def _sum_of_rows(ptr, width, first, rows, TILE: tl.constexpr, GROUP: tl.constexpr):
    """Columns [first, first + TILE) of a contiguous (rows, width) matrix, summed over the rows, always in one order.

    GROUP rows are read at a time: one after the other, each would wait for memory.
    """
    columns = first + tl.arange(0, TILE)
    total = tl.zeros([GROUP, TILE], tl.float32)
    for start in range(0, rows, GROUP):
        row = start + tl.arange(0, GROUP)
        inside = (row < rows)[:, None] & (columns < width)[None, :]
        total += tl.load(ptr + row[:, None] * width + columns[None, :], mask=inside, other=0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["splits"])
def reduce_kernel(
    partial_state_ptr,
    partial_sum_ptr,
    state_ptr,
    key_sum_ptr,
    splits,
    STATE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
):
    """state (B * H, STATE) and key_sum (B * H, HEAD_DIM) from partials with `splits` rows each, always in their order.

    Grid (B * H, tiles of STATE, and one more for key_sum).
    """
    pair, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE
    places = tl.arange(0, TILE)
    if first < STATE:
        total = _sum_of_rows(partial_state_ptr + pair * splits * STATE, STATE, first, splits, TILE, GROUP)
        tl.store(state_ptr + pair * STATE + first + places, total, mask=first + places < STATE)
    else:
        total = _sum_of_rows(partial_sum_ptr + pair * splits * HEAD_DIM, HEAD_DIM, 0, splits, TILE, GROUP)
        tl.store(key_sum_ptr + pair * HEAD_DIM + places, total, mask=places < HEAD_DIM)
