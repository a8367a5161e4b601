"""Pieces that both kernels share: which rows a tile holds, and the means of blocks that are one or several tiles."""

import triton
import triton.language as tl


@triton.jit
def blocks_of_program(tokens, BLOCK: tl.constexpr):
    """First and last + 1 of this program's blocks: programs along y share them evenly."""
    blocks = tl.cdiv(tokens, BLOCK)
    split, splits = tl.program_id(1), tl.num_programs(1)
    return split * blocks // splits, (split + 1) * blocks // splits


@triton.jit
def pool_tile(
    pooled_ptr,
    total,
    seen,
    tile,
    valid,
    number,
    tokens,
    HEAD_DIM: tl.constexpr,
    TILE_D: tl.constexpr,
    TILE_S: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """Add the rows of tile `number` to the sum of its block, and with the last tile of the block write the mean.

    pooled_ptr: (M, HEAD_DIM) means of this batch and head. tile: 0 in rows that are not valid. Returns sum and count
    for the next tile.
    """
    TILES: tl.constexpr = BLOCK // TILE_S
    total += tl.sum(tile.to(tl.float32), 0)
    if HAS_MASK:
        seen += tl.sum(valid.to(tl.int32), 0)
    else:
        seen = tl.minimum(BLOCK, tokens - number // TILES * BLOCK)
    channels = tl.arange(0, TILE_D)
    last = number % TILES == TILES - 1
    mean = total / tl.maximum(seen, 1).to(tl.float32)
    tl.store(pooled_ptr + (number // TILES) * HEAD_DIM + channels, mean, mask=(channels < HEAD_DIM) & last)
    return tl.where(last, 0.0, total), tl.where(last, 0, seen)
