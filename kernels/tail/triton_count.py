"""Counting what the lists of selected blocks leave out, for every query block: one program each."""

import triton
import triton.language as tl

from ..layout import ALL_BLOCKS as _ALL_BLOCKS

ALL_BLOCKS: tl.constexpr = tl.constexpr(_ALL_BLOCKS)


@triton.jit
def _tokens_between(first, last, summed_ptr, begin, end, HAS_MASK: tl.constexpr):
    """How many tokens of [first, last) a pool may stand for: those in [begin, end) that are valid, int32."""
    first = tl.minimum(tl.maximum(first, begin), end)
    last = tl.minimum(tl.maximum(last, begin), end)
    return tl.load(summed_ptr + last) - tl.load(summed_ptr + first) if HAS_MASK else last - first


@triton.jit(do_not_specialize=["tokens", "query_blocks", "slots", "pools", "begin", "end"])
def count_kernel(
    lut_ptr,
    count_ptr,
    summed_ptr,
    counted_ptr,
    heads,
    tokens,
    query_blocks,
    slots,
    pools,
    begin,
    end,
    KEY_BLOCK: tl.constexpr,
    POOL: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """lut int32 (B, H, Mq, L), count int32 (B, H, Mq), summed int32 (B, S + 1) -> counted fp32 (B, H, Mq, P).

    All contiguous. summed: entry n is how many of the first n tokens are valid.
    """
    block, head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row = (batch * heads + head) * query_blocks + block
    counted_ptr += row * pools
    lut_ptr += row * slots
    if HAS_MASK:
        summed_ptr += batch * (tokens + 1)
    count = tl.load(count_ptr + row)
    columns = tl.arange(0, CHUNK)
    for start in range(0, pools, CHUNK):
        pool = start + columns
        held = _tokens_between(pool * POOL, (pool + 1) * POOL, summed_ptr, begin, end, HAS_MASK)
        tl.store(counted_ptr + pool, tl.where(count == ALL_BLOCKS, 0, held).to(tl.float32), mask=pool < pools)
    tl.debug_barrier()  # what follows changes what other threads have written
    if POOL >= KEY_BLOCK:
        for start in range(0, slots, CHUNK):
            slot = start + columns
            first = tl.load(lut_ptr + slot, mask=slot < count, other=0) * KEY_BLOCK
            held = _tokens_between(first, first + KEY_BLOCK, summed_ptr, begin, end, HAS_MASK)
            # sums of whole numbers, which fp32 holds: the order does not matter
            tl.atomic_add(counted_ptr + first // POOL, -held.to(tl.float32), mask=slot < count, sem="relaxed")
    else:
        pools_each: tl.constexpr = KEY_BLOCK // POOL
        for start in range(0, slots * pools_each, CHUNK):
            slot = (start + columns) // pools_each
            listed = tl.load(lut_ptr + slot, mask=slot < count, other=0)
            pool = listed * pools_each + (start + columns) % pools_each
            tl.store(counted_ptr + pool, tl.zeros_like(columns).to(tl.float32), mask=(slot < count) & (pool < pools))
