"""What selection by mass knows of a block: the means of its cells, and squares or variances, as rows of products."""

import triton
import triton.language as tl

# What a row behind those of the cells holds, of the whole block.
NOTHING: tl.constexpr = tl.constexpr(0)
SQUARED_MEAN: tl.constexpr = tl.constexpr(1)  # of queries
VARIANCE: tl.constexpr = tl.constexpr(2)  # of keys, times what the spread of the values says
SPREAD: tl.constexpr = tl.constexpr(3)  # of values: no row but the sum of their variances

_EXPONENT: tl.constexpr = tl.constexpr(0x7F800000)
_LARGEST: tl.constexpr = tl.constexpr(0x7E800000)  # 2 ** 126, whose inverse is no subnormal number
_ONE: tl.constexpr = tl.constexpr(0x3F800000)


@triton.jit
def _store(rows, places, stored, factors, rows_ptr, factor_ptr, TILE_D: tl.constexpr):
    """Store rows fp32 (N, TILE_D), and what products of them are to be multiplied with.

    16-bit rows are divided by the power of two in their largest entry, so that none overflows, and what underflows is
    less than 2 ** -24 of the largest.
    """
    if rows_ptr.dtype.element_ty == tl.float16:
        largest = tl.max(tl.abs(rows), 1).to(tl.int32, bitcast=True) & _EXPONENT
        largest = tl.where(largest == 0, _ONE, tl.minimum(largest, _LARGEST))
        # the exponents of a power of two and of its inverse are together those of two ones
        rows = rows * (0x7F000000 - largest).to(tl.float32, bitcast=True)[:, None]
        factors = factors * largest.to(tl.float32, bitcast=True)
    pointers = rows_ptr + places.to(tl.int64)[:, None] * TILE_D + tl.arange(0, TILE_D)[None, :]
    tl.store(pointers, rows.to(rows_ptr.dtype.element_ty), mask=stored[:, None])
    tl.store(factor_ptr + places, factors, mask=stored)


@triton.jit(do_not_specialize=["heads", "tokens", "blocks", "factor"])
def rows_kernel(
    x_ptr,
    mask_ptr,
    spread_ptr,
    rows_ptr,
    factor_ptr,
    log_held_ptr,
    strides,
    heads,
    tokens,
    blocks,
    factor,
    HEAD_DIM: tl.constexpr,
    TILE_D: tl.constexpr,
    CELL: tl.constexpr,
    CELLS: tl.constexpr,
    BLOCKS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    EXTRA: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """x (B, H, S, D), adjacent channels -> for each head CELLS rows a block, and one more with EXTRA.

    rows (B, H, R, M, TILE_D), factor and log_held fp32 (B, H, R, M): row c of a block is the mean of its cell c, and
    log_held the base-2 logarithm of the valid tokens in there. So tiles of rows are the same cell of many blocks.
    spread fp32 (B, H, M): written of values, read with keys.
    """
    SLICES: tl.constexpr = CELLS + (EXTRA != NOTHING)
    groups = tl.cdiv(blocks, BLOCKS)
    # heads first: in the usual layout their rows lie side by side in memory
    program = tl.program_id(0)
    head = program % heads
    first = program // heads % groups * BLOCKS
    batch = (program // heads // groups).to(tl.int64)
    channels = tl.arange(0, TILE_D)
    cells = tl.arange(0, BLOCKS * CELLS)
    begin = (first * CELLS + cells) * CELL
    x_ptr += batch * strides[0] + head.to(tl.int64) * strides[1]

    total = tl.zeros((BLOCKS * CELLS, TILE_D), tl.float32)
    squares = tl.zeros((BLOCKS * CELLS, TILE_D), tl.float32)
    seen = tl.zeros((BLOCKS * CELLS,), tl.int32)
    for token in range(0, CELL, AT_ONCE):
        for ahead in tl.static_range(AT_ONCE):
            positions = begin + token + ahead
            valid = positions < tokens
            if HAS_MASK:
                valid = valid & (tl.load(mask_ptr + batch * tokens + positions, mask=valid, other=0) != 0)
            pointers = x_ptr + positions.to(tl.int64)[:, None] * strides[2] + channels[None, :]
            x = tl.load(pointers, mask=valid[:, None] & (channels < HEAD_DIM)[None, :], other=0.0).to(tl.float32)
            total += x
            if EXTRA >= VARIANCE:
                squares += x * x
            seen += valid.to(tl.int32)

    held = seen.to(tl.float32)
    of_head = batch * heads + head
    rows_ptr += of_head * SLICES * blocks * TILE_D
    factor_ptr += of_head * SLICES * blocks
    block = first + cells // CELLS
    if EXTRA != SPREAD:
        places = cells % CELLS * blocks + block
        means = total / tl.maximum(held, 1.0)[:, None]
        factors = tl.zeros((BLOCKS * CELLS,), tl.float32) + factor
        _store(means, places, block < blocks, factors, rows_ptr, factor_ptr, TILE_D)
        tl.store(log_held_ptr + of_head * SLICES * blocks + places, tl.log2(held), mask=block < blocks)
    if EXTRA != NOTHING:
        block = first + tl.arange(0, BLOCKS)
        whole = tl.maximum(tl.sum(tl.reshape(held, (BLOCKS, CELLS)), 1), 1.0)[:, None]
        mean = tl.sum(tl.reshape(total, (BLOCKS, CELLS, TILE_D)), 1) / whole
        extra = mean * mean
        if EXTRA >= VARIANCE:
            of_squares = tl.sum(tl.reshape(squares, (BLOCKS, CELLS, TILE_D)), 1) / whole
            # Not below but at most: where both are equal, multiplying and subtracting with a single rounding leaves
            # what the square was rounded by, and sqrt makes NaN of it. NaN stays NaN.
            extra = tl.where(of_squares <= extra, 0.0, of_squares - extra)
        if EXTRA == SPREAD:
            tl.store(spread_ptr + of_head * blocks + block, tl.sum(extra, 1), mask=block < blocks)
        else:
            factors = tl.full((BLOCKS,), 1.0, tl.float32)
            if EXTRA == VARIANCE:
                factors = tl.load(spread_ptr + of_head * blocks + block, mask=block < blocks, other=0.0)
            _store(extra, CELLS * blocks + block, block < blocks, factors, rows_ptr, factor_ptr, TILE_D)
