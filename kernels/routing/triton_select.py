"""Keeping the best key blocks of every query block: one program per row of scores, without a sort."""

import triton
import triton.language as tl

# Scores are compared as int32 keys of the same order. Beyond those of all numbers lie these:
_EXCLUDED: tl.constexpr = tl.constexpr(-0x80000000)
_NAN: tl.constexpr = tl.constexpr(-0x7FFFFFFF)
_FORCED: tl.constexpr = tl.constexpr(0x7FFFFFFE)


@triton.jit
def _keys(row, columns, HAS_MASK: tl.constexpr):
    """Keys of the scores at `columns` of a row; see `select_kernel` for what a row is."""
    scores_ptr, valid_ptr, key_blocks, own_first, own_end, sink_first, sink_end = row
    in_range = columns < key_blocks
    score = tl.load(scores_ptr + columns, mask=in_range, other=0.0)
    bits = (score + 0.0).to(tl.int32, bitcast=True)  # -0.0 becomes 0.0, with which it ties
    # the bits of negative numbers fall where the numbers rise
    keys = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    keys = tl.where(score == score, keys, _NAN)
    own = (columns >= own_first) & (columns < own_end)
    sink = (columns >= sink_first) & (columns < sink_end)
    keys = tl.where(own | sink, _FORCED, keys)
    if HAS_MASK:
        in_range = in_range & (tl.load(valid_ptr + columns, mask=in_range, other=0) != 0)
    return tl.where(in_range, keys, _EXCLUDED)


@triton.jit
def _count(row, resident, bound, HAS_MASK: tl.constexpr, RESIDENT: tl.constexpr, CHUNK: tl.constexpr):
    """How many keys of the row are at least `bound`. Those beyond the resident ones are loaded again every time."""
    counted = tl.sum((resident >= bound).to(tl.int32), 0)
    for start in range(RESIDENT, row[2], CHUNK):
        keys = _keys(row, start + tl.arange(0, CHUNK), HAS_MASK)
        counted += tl.sum((keys >= bound).to(tl.int32), 0)
    return counted


@triton.jit
def _threshold(row, resident, keep, HAS_MASK: tl.constexpr, RESIDENT: tl.constexpr, CHUNK: tl.constexpr):
    """The largest bound that at least `keep` keys reach, bit by bit; or a smaller one that exactly `keep` reach."""
    threshold = _EXCLUDED
    reached = -1
    bit = 31
    while (bit >= 0) & (reached != keep):
        higher = threshold ^ (1 << bit)
        counted = _count(row, resident, higher, HAS_MASK, RESIDENT, CHUNK)
        threshold = tl.where(counted >= keep, higher, threshold)
        reached = tl.where(counted >= keep, counted, reached)
        bit -= 1
    return threshold


@triton.jit
def _write(lut_ptr, keys, columns, threshold, ties, above_before, tied_before):
    """Append the chosen columns: keys above the threshold, and the first `ties` of those that equal it. Returns how
    many there were of either, `..._before` included."""
    above = (keys > threshold).to(tl.int32)
    tied = (keys == threshold).to(tl.int32)
    # two sums in one: neither reaches 2 ** 15 within a tile
    packed = above | (tied << 16)
    until = tl.cumsum(packed, 0)
    above_until = above_before + (until & 0xFFFF)
    tied_until = tied_before + (until >> 16)
    chosen = (above != 0) | ((tied != 0) & (tied_until <= ties))
    tl.store(lut_ptr + above_until + tl.minimum(tied_until, ties) - 1, columns, mask=chosen)
    everything = tl.sum(packed, 0)
    return above_before + (everything & 0xFFFF), tied_before + (everything >> 16)


@triton.jit
def _select(row, lut_ptr, count_ptr, slots, HAS_MASK: tl.constexpr, RESIDENT: tl.constexpr, CHUNK: tl.constexpr):
    """Write the ids of the best blocks of one row, ascending, and their number."""
    columns = tl.arange(0, RESIDENT)
    resident = _keys(row, columns, HAS_MASK)
    keep = slots
    if HAS_MASK:
        keep = tl.minimum(slots, _count(row, resident, _NAN, HAS_MASK, RESIDENT, CHUNK))
    threshold = _threshold(row, resident, keep, HAS_MASK, RESIDENT, CHUNK)
    ties = keep - _count(row, resident, threshold + 1, HAS_MASK, RESIDENT, CHUNK)
    above, tied = _write(lut_ptr, resident, columns, threshold, ties, 0, 0)
    for start in range(RESIDENT, row[2], CHUNK):
        columns = start + tl.arange(0, CHUNK)
        above, tied = _write(lut_ptr, _keys(row, columns, HAS_MASK), columns, threshold, ties, above, tied)
    if HAS_MASK:
        for start in range(keep, slots, CHUNK):
            unused = start + tl.arange(0, CHUNK)
            tl.store(lut_ptr + unused, 0, mask=unused < slots)
    tl.store(count_ptr, keep)


@triton.jit(
    do_not_specialize=[
        "query_blocks",
        "key_blocks",
        "slots",
        "query_block",
        "key_block",
        "sink_first",
        "sink_end",
        "text_first",
        "text_end",
    ]
)
def select_kernel(
    scores_ptr,
    valid_ptr,
    lut_ptr,
    count_ptr,
    query_blocks,
    key_blocks,
    slots,
    query_block,
    key_block,
    sink_first,
    sink_end,
    text_first,
    text_end,
    HAS_MASK: tl.constexpr,
    NARROW: tl.constexpr,
    WIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    ALL_BLOCKS: tl.constexpr,
):
    """scores fp32 (G, Mq, Mk), valid uint8 (G, Mk) or None -> lut int32 (G, Mq, K), count int32 (G, Mq).

    [sink_first, sink_end) are the key blocks, [text_first, text_end) the query blocks that hold text. Up to WIDE keys of
    a row stay in registers, NARROW where they suffice; longer rows are read again in chunks.
    """
    program = tl.program_id(0).to(tl.int64)
    block = (program % query_blocks).to(tl.int32)
    lut_ptr += program * slots
    count_ptr += program
    if (block >= text_first) & (block < text_end):
        for start in range(0, slots, CHUNK):
            ids = start + tl.arange(0, CHUNK)
            tl.store(lut_ptr + ids, ids, mask=ids < slots)
        tl.store(count_ptr, ALL_BLOCKS)
    else:
        if HAS_MASK:
            valid_ptr += program // query_blocks * key_blocks
        own_first = block * query_block // key_block
        own_end = ((block + 1) * query_block + key_block - 1) // key_block
        row = (scores_ptr + program * key_blocks, valid_ptr, key_blocks, own_first, own_end, sink_first, sink_end)
        if key_blocks <= NARROW:
            _select(row, lut_ptr, count_ptr, slots, HAS_MASK, NARROW, CHUNK)
        else:
            _select(row, lut_ptr, count_ptr, slots, HAS_MASK, WIDE, CHUNK)
