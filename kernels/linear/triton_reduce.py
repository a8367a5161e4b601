"""The kernel that adds up what the splits of one (batch, head) pair have summed."""

import triton
import triton.language as tl


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
):
    """state (B * H, STATE) and key_sum (B * H, HEAD_DIM) from partials with `splits` rows each, always in their order.

    Grid (B * H, tiles of STATE, and one more for key_sum).
    """
    pair, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if tile * TILE < STATE:
        places = tile * TILE + tl.arange(0, TILE)
        inside = places < STATE
        total = tl.zeros([TILE], tl.float32)
        for split in range(splits):
            total += tl.load(partial_state_ptr + (pair * splits + split) * STATE + places, mask=inside, other=0.0)
        tl.store(state_ptr + pair * STATE + places, total, mask=inside)
    else:
        places = tl.arange(0, TILE)
        inside = places < HEAD_DIM
        total = tl.zeros([TILE], tl.float32)
        for split in range(splits):
            total += tl.load(partial_sum_ptr + (pair * splits + split) * HEAD_DIM + places, mask=inside, other=0.0)
        tl.store(key_sum_ptr + pair * HEAD_DIM + places, total, mask=inside)
