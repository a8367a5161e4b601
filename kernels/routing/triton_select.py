"""Keeping the best key blocks of every query block: one program per row of scores, without a sort."""

import triton
import triton.language as tl

# Scores are compared as int32 keys of the same order. Beyond those of all numbers lie these:
_EXCLUDED: tl.constexpr = tl.constexpr(-0x80000000)
_NAN: tl.constexpr = tl.constexpr(-0x7FFFFFFF)
_FORCED: tl.constexpr = tl.constexpr(0x7FFFFFFE)
_INFINITY: tl.constexpr = tl.constexpr(0x7F800000)


@triton.jit
def _keys(row, columns, HAS_MASK: tl.constexpr):
    """Keys of the scores at `columns` of a row; `select_kernel` makes rows."""
    scores_ptr, valid_ptr, width, key_blocks, own_first, own_end, sink_first, sink_end = row
    # The width is a multiple of 16, the number of blocks need not be: this mask alone leaves whole vectors to load.
    readable = columns < width
    scores = tl.load(scores_ptr + columns, mask=readable, other=0.0)
    bits = (scores + 0.0).to(tl.int32, bitcast=True)  # -0.0 becomes the 0.0 that it equals
    # the bits of negative numbers fall where the numbers rise; a negative NaN comes out below them by itself
    keys = tl.where(bits > _INFINITY, _NAN, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    own = (columns >= own_first) & (columns < own_end)
    sink = (columns >= sink_first) & (columns < sink_end)
    keys = tl.where(own | sink, _FORCED, keys)
    eligible = columns < key_blocks
    if HAS_MASK:
        eligible = eligible & (tl.load(valid_ptr + columns, mask=readable, other=0) != 0)
    return tl.where(eligible, tl.maximum(keys, _NAN), _EXCLUDED)


@triton.jit
def _tile(row, START: tl.constexpr, HAS_MASK: tl.constexpr, TILE: tl.constexpr):
    """The keys from START on; not computed where the row is shorter."""
    keys = tl.full((TILE,), _EXCLUDED, tl.int32)
    if row[3] > START:
        keys = _keys(row, START + tl.arange(0, TILE), HAS_MASK)
    return keys


@triton.jit
def _count(row, tiles, bound, HAS_MASK: tl.constexpr, TILE: tl.constexpr):
    """How many keys of the row are at least `bound`. Those beyond the tiles are loaded again every time."""
    counted = tl.sum((tiles[0] >= bound).to(tl.int32), 0)
    for i in tl.static_range(1, len(tiles)):
        if row[3] > i * TILE:
            counted += tl.sum((tiles[i] >= bound).to(tl.int32), 0)
    for start in range(len(tiles) * TILE, row[3], TILE):
        keys = _keys(row, start + tl.arange(0, TILE), HAS_MASK)
        counted += tl.sum((keys >= bound).to(tl.int32), 0)
    return counted


@triton.jit
def _threshold(row, tiles, keep, HAS_MASK: tl.constexpr, TILE: tl.constexpr):
    """The largest bound that at least `keep` keys reach, bit by bit; or a smaller one that exactly `keep` reach."""
    threshold = _EXCLUDED
    reached = -1
    bit = 31
    while (bit >= 0) & (reached != keep):
        higher = threshold ^ (1 << bit)
        counted = _count(row, tiles, higher, HAS_MASK, TILE)
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
    place = above_until + tl.minimum(tied_until, ties) - 1
    tl.store(lut_ptr + place, columns, mask=chosen)
    everything = tl.sum(packed, 0)
    return above_before + (everything & 0xFFFF), tied_before + (everything >> 16)


@triton.jit
def _kept(permille_ptr, row, slots, query_block, key_block):
    """As `density.kept_now`."""
    key_blocks, sinks = row[3], row[7] - row[6]
    wanted = tl.maximum(tl.maximum(query_block // key_block, 1), key_blocks * tl.load(permille_ptr) // 1000)
    return tl.minimum(tl.minimum(wanted, key_blocks) + sinks, slots)


@triton.jit
def _select(row, lut_ptr, count_ptr, slots, keep, HAS_MASK: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr):
    """Write the ids of the `keep` best blocks of one row, ascending, and their number; zeros up to `slots`."""
    tiles = ()
    for i in tl.static_range(TILES):
        tiles += (_tile(row, i * TILE, HAS_MASK, TILE),)
    if HAS_MASK:
        keep = tl.minimum(keep, _count(row, tiles, _NAN, HAS_MASK, TILE))
    threshold = _threshold(row, tiles, keep, HAS_MASK, TILE)
    ties = keep - _count(row, tiles, threshold + 1, HAS_MASK, TILE)
    above, tied = 0, 0
    # read once more: sums over all tiles at once would need too many registers
    for start in range(0, row[3], TILE):
        columns = start + tl.arange(0, TILE)
        above, tied = _write(lut_ptr, _keys(row, columns, HAS_MASK), columns, threshold, ties, above, tied)
    for start in range(keep, slots, TILE):
        unused = start + tl.arange(0, TILE)
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
    ],
    # the lists of a group of heads begin anywhere
    do_not_specialize_on_alignment=["lut_ptr", "count_ptr", "permille_ptr"],
)
def select_kernel(
    scores_ptr,
    valid_ptr,
    lut_ptr,
    count_ptr,
    permille_ptr,
    width,
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
    HAS_PERMILLE: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    ALL_BLOCKS: tl.constexpr,
):
    """scores fp32 (G, Mq, width), valid uint8 (G, width) or None -> lut int32 (G, Mq, K), count int32 (G, Mq).

    permille: int32 () or None, see `api.select_blocks`.
    Columns from Mk on are not read. [sink_first, sink_end) are the key blocks, [text_first, text_end) the query blocks
    that hold text. The first TILES tiles of a row stay in registers.
    """
    program = tl.program_id(0).to(tl.int64)
    block = (program % query_blocks).to(tl.int32)
    lut_ptr += program * slots
    count_ptr += program
    if (block >= text_first) & (block < text_end):
        for start in range(0, slots, TILE):
            ids = start + tl.arange(0, TILE)
            tl.store(lut_ptr + ids, ids, mask=ids < slots)
        tl.store(count_ptr, ALL_BLOCKS)
    else:
        if HAS_MASK:
            valid_ptr += program // query_blocks * width
        own_first = block * query_block // key_block
        own_end = ((block + 1) * query_block + key_block - 1) // key_block
        scores_ptr += program * width
        row = (scores_ptr, valid_ptr, width, key_blocks, own_first, own_end, sink_first, sink_end)
        keep = slots
        if HAS_PERMILLE:
            keep = _kept(permille_ptr, row, slots, query_block, key_block)
        _select(row, lut_ptr, count_ptr, slots, keep, HAS_MASK, TILE, TILES)
