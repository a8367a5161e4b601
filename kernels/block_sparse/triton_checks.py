"""The kernel that looks for entries that lists of blocks must not have."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows", "slots", "key_blocks"])
def check_selection_kernel(
    lut_ptr, count_ptr, flags_ptr, rows, slots, key_blocks, ROWS: tl.constexpr, CHUNK: tl.constexpr
):
    """flags[0] becomes 1 if a count is wrong, flags[1] if an id is out of range or does not ascend."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    count = tl.load(count_ptr + row, mask=row < rows, other=0)
    wrong_count = (count < -1) | (count > slots)
    wrong = tl.zeros([ROWS, CHUNK], tl.int32)
    for begin in tl.range(0, slots, CHUNK):
        entry = begin + tl.arange(0, CHUNK)
        listed = (entry[None, :] < count[:, None]) & (entry < slots)[None, :]
        pointers = lut_ptr + row.to(tl.int64)[:, None] * slots + entry[None, :]
        block = tl.load(pointers, mask=listed, other=0)
        before = tl.load(pointers - 1, mask=listed & (entry > 0)[None, :], other=-1)
        wrong = wrong | (listed & ((block < 0) | (block >= key_blocks) | (block <= before))).to(tl.int32)
    tl.store(flags_ptr, 1, mask=tl.max(wrong_count.to(tl.int32), 0) > 0)
    tl.store(flags_ptr + 1, 1, mask=tl.max(tl.max(wrong, 1), 0) > 0)
