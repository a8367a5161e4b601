"""The Triton kernels for the means of pools: one program for each pool of a head."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["heads", "tokens", "pools", "size", "begin", "end"])
def row_means_kernel(
    x_ptr,
    order_ptr,
    mask_ptr,
    moved_ptr,
    means_ptr,
    strides,
    moved_strides,
    heads,
    tokens,
    pools,
    size,
    begin,
    end,
    HEAD_DIM: tl.constexpr,
    TILE_D: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """x (B, H, S, D), adjacent channels -> means (B, H, P, D), contiguous: of `size` rows, the valid in [begin, end).

    order int32 (S,) or None: row order[i] of x counts as row i, and is written into moved (B, H, S, D). mask uint8
    (B, S) or None: which rows are valid.
    """
    # heads first: in the usual layout their rows lie side by side in memory
    program = tl.program_id(0)
    head = program % heads
    pool = program // heads % pools
    batch = (program // heads // pools).to(tl.int64)
    channels = tl.arange(0, TILE_D)
    x_ptr += batch * strides[0] + head.to(tl.int64) * strides[1]
    if order_ptr is not None:
        moved_ptr += batch * moved_strides[0] + head.to(tl.int64) * moved_strides[1]

    total = tl.zeros((ROWS, TILE_D), tl.float32)
    seen = tl.zeros((ROWS,), tl.int32)
    for first in range(0, tl.minimum(size, tokens - pool * size), TILES * ROWS):
        tiles = ()  # all loads before the first store, which no load could pass
        for tile in tl.static_range(TILES):
            offsets = first + tile * ROWS + tl.arange(0, ROWS)
            positions = pool * size + offsets
            exists = (offsets < size) & (positions < tokens)
            rows = positions.to(tl.int64)
            if order_ptr is not None:
                rows = tl.load(order_ptr + positions, mask=exists, other=0).to(tl.int64)
                rows = tl.minimum(tl.maximum(rows, 0), tokens - 1)  # an order that is none must not leave x
            readable = exists[:, None] & (channels < HEAD_DIM)[None, :]
            pointers = x_ptr + rows[:, None] * strides[2] + channels[None, :]
            tiles += (tl.load(pointers, mask=readable, other=0.0),)
        for tile in tl.static_range(TILES):
            offsets = first + tile * ROWS + tl.arange(0, ROWS)
            positions = pool * size + offsets
            exists = (offsets < size) & (positions < tokens)
            if order_ptr is not None:
                places = positions.to(tl.int64)[:, None] * moved_strides[2] + channels[None, :]
                tl.store(moved_ptr + places, tiles[tile], mask=exists[:, None] & (channels < HEAD_DIM)[None, :])
            counts = exists & (positions >= begin) & (positions < end)
            if mask_ptr is not None:
                counts = counts & (tl.load(mask_ptr + batch * tokens + positions, mask=exists, other=0) != 0)
            total += tl.where(counts[:, None], tiles[tile], 0.0).to(tl.float32)  # whatever the others hold
            seen += counts.to(tl.int32)

    mean = tl.sum(total, 0) / tl.maximum(tl.sum(seen, 0), 1).to(tl.float32)
    means_ptr += ((batch * heads + head) * pools + pool) * HEAD_DIM
    tl.store(means_ptr + channels, mean.to(means_ptr.dtype.element_ty), mask=channels < HEAD_DIM)


@triton.jit(do_not_specialize=["heads", "tokens", "blocks", "pools", "begin", "end"])
def block_means_kernel(
    blocks_ptr,
    mask_ptr,
    means_ptr,
    heads,
    tokens,
    blocks,
    pools,
    begin,
    end,
    HEAD_DIM: tl.constexpr,
    TILE_D: tl.constexpr,
    BLOCK: tl.constexpr,
    EACH: tl.constexpr,
):
    """blocks fp32 (B, H, M, D), means of BLOCK rows each -> means (B, H, P, D), of EACH blocks. All contiguous.

    A block has as much weight as it has valid rows in [begin, end): of these alone its mean must be. mask: uint8 (B, S)
    or None.
    """
    program = tl.program_id(0)
    head = program % heads
    pool = program // heads % pools
    batch = (program // heads // pools).to(tl.int64)
    channels = tl.arange(0, TILE_D)
    blocks_ptr += (batch * heads + head) * blocks * HEAD_DIM
    total = tl.zeros((TILE_D,), tl.float32)
    seen = 0.0
    for each in range(EACH):
        block = pool * EACH + each
        if mask_ptr is not None:
            positions = block * BLOCK + tl.arange(0, BLOCK)
            counts = (positions >= begin) & (positions < tl.minimum(end, tokens))
            valid = tl.load(mask_ptr + batch * tokens + positions, mask=counts, other=0) != 0
            weight = tl.sum(valid.to(tl.int32), 0).to(tl.float32)
        else:
            last = tl.minimum(tl.minimum((block + 1) * BLOCK, end), tokens)
            weight = tl.maximum(last - tl.maximum(block * BLOCK, begin), 0).to(tl.float32)
        readable = channels < tl.where(block < blocks, HEAD_DIM, 0)
        mean = tl.load(blocks_ptr + block.to(tl.int64) * HEAD_DIM + channels, mask=readable, other=0.0)
        total += weight * mean
        seen += weight
    means_ptr += ((batch * heads + head) * pools + pool) * HEAD_DIM
    mean = total / tl.maximum(seen, 1.0)
    tl.store(means_ptr + channels, mean.to(means_ptr.dtype.element_ty), mask=channels < HEAD_DIM)
