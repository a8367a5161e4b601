"""Kernels that invert a selection. Integers only; what is written depends on no order of execution."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["slots", "query_blocks", "key_blocks"])
def mark_kernel(lut_ptr, count_ptr, member_ptr, slots, query_blocks, key_blocks, CHUNK: tl.constexpr):
    """member (B * H, Mq, Mk + 1), uint8, zeroed: 1 where query block i lists key block j; column Mk: it lists all."""
    row = tl.program_id(1).to(tl.int64) * query_blocks + tl.program_id(0)
    lut_ptr += row * slots
    member_ptr += row * (key_blocks + 1)
    count = tl.load(count_ptr + row)
    for begin in tl.range(0, tl.minimum(count, slots), CHUNK):
        entries = begin + tl.arange(0, CHUNK)
        block = tl.load(lut_ptr + entries, mask=entries < count, other=-1)
        tl.store(member_ptr + block, tl.full([CHUNK], 1, tl.uint8), mask=(block >= 0) & (block < key_blocks))
    if count < 0:
        tl.store(member_ptr + key_blocks, tl.full([], 1, tl.uint8))


@triton.jit(do_not_specialize=["query_blocks", "columns", "capacity"])
def fill_kernel(
    member_ptr, start_ptr, rows_ptr, query_blocks, columns, capacity, TILE_Q: tl.constexpr, TILE_K: tl.constexpr
):
    """rows (B * H, capacity): for every column of member the rows that hold 1, ascending, from where start says."""
    group = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * TILE_K + tl.arange(0, TILE_K)
    exists = column < columns
    member_ptr += group * query_blocks * columns
    rows_ptr += group * capacity
    position = tl.load(start_ptr + group * (columns + 1) + column, mask=exists, other=0)
    for begin in tl.range(0, query_blocks, TILE_Q):
        row = begin + tl.arange(0, TILE_Q)
        pointers = member_ptr + row[:, None] * columns + column[None, :]
        member = tl.load(pointers, mask=(row < query_blocks)[:, None] & exists[None, :], other=0).to(tl.int32)
        before = tl.cumsum(member, 0) - member
        values = tl.broadcast_to(row[:, None], [TILE_Q, TILE_K])
        tl.store(rows_ptr + position[None, :] + before, values, mask=member != 0)
        position += tl.sum(member, 0)
