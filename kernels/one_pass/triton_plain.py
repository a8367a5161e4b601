# mypy: ignore-errors
"""The kernels of both operators for the plain case on Hopper: relu, bf16, neither order, mask nor rotated rows.

Tiles come through descriptors, so that they arrive in shared memory, where the tensor cores read them. Sums over the
rows of a tile are taken by tensor cores too, as products with ones: `tl.sum` adds rows that lie in different warps and
makes all of them wait for each other, once per tile. Rows beyond the end arrive as zeros and add nothing.
"""

import triton
import triton.language as tl

from .triton_pooling import blocks_of_program

_COLUMNS: tl.constexpr = tl.constexpr(8)  # of the narrowest right factor that Hopper's tensor cores take


@triton.jit
def _load_rows(descriptor, batch, head, start, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """(ROWS, WIDTH) rows from token `start` on, of a descriptor of (B, H, S, WIDTH)."""
    return descriptor.load([batch, head, start, 0]).reshape([ROWS, WIDTH])


@triton.jit
def _pool_tile(pooled_ptr, total, tile, number, tokens, WIDTH: tl.constexpr, TILE_S: tl.constexpr, BLOCK: tl.constexpr):
    """Add tile `number` to the sum of its block, and with the last tile of the block write the mean.

    pooled_ptr: (M, WIDTH) means of this batch and head. total: (WIDTH, 8) in fp32, eight times the same column.
    Returns total for the next tile.
    """
    TILES: tl.constexpr = BLOCK // TILE_S
    ones = tl.full([TILE_S, _COLUMNS], 1.0, tile.dtype)
    total = tl.dot(tl.trans(tile), ones, total)
    block, last = number // TILES, number % TILES == TILES - 1
    # the largest of eight equal columns is any of them
    mean = tl.max(total, 1) / tl.minimum(BLOCK, tokens - block * BLOCK).to(tl.float32)
    tl.store(pooled_ptr + block * WIDTH + tl.arange(0, WIDTH), mean, mask=last)
    return tl.where(last, 0.0, total)


@triton.jit(do_not_specialize=["heads", "tokens"])
def plain_keys_kernel(
    key,
    value,
    pooled_ptr,
    state_ptr,
    key_sum_ptr,
    heads,
    tokens,
    WIDTH: tl.constexpr,
    TILE_S: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """key and value: descriptors of (B, H, S, WIDTH). The results and the grid are those of `keys_kernel`.

    ROWS: rows of a tile that lie in different threads. Their features are added up after the loop only.
    """
    pair = tl.program_id(0)
    batch, head = pair // heads, pair % heads
    pooled_ptr += pair.to(tl.int64) * tl.cdiv(tokens, BLOCK) * WIDTH
    TILES: tl.constexpr = BLOCK // TILE_S

    transposed = tl.zeros([WIDTH, WIDTH], tl.float32)  # so that the value, as it lies in memory, is the left factor
    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    total = tl.zeros([WIDTH, _COLUMNS], tl.float32)
    first, stop = blocks_of_program(tokens, BLOCK)
    for tile in range(first * TILES, stop * TILES):
        k = _load_rows(key, batch, head, tile * TILE_S, TILE_S, WIDTH)
        v = _load_rows(value, batch, head, tile * TILE_S, TILE_S, WIDTH)
        features = tl.maximum(k.to(tl.float32), 0.0)
        transposed = tl.dot(tl.trans(v), features.to(k.dtype), transposed)
        sums += tl.sum(tl.reshape(features, [TILE_S // ROWS, ROWS, WIDTH]), 0)
        total = _pool_tile(pooled_ptr, total, k, tile, tokens, WIDTH, TILE_S, BLOCK)

    partial = pair.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    channels = tl.arange(0, WIDTH)
    places = state_ptr + partial * (WIDTH * WIDTH) + channels[:, None] * WIDTH + channels[None, :]
    tl.store(places, tl.trans(transposed))
    tl.store(key_sum_ptr + partial * WIDTH + channels, tl.sum(sums, 0))


@triton.jit
def _three_columns(x):
    """fp32 (D,) as (D, 8) in bf16 with the same sum, to 24 bits: rounded, what rounding lost, and once more."""
    high = x.to(tl.bfloat16).to(tl.float32)
    middle = (x - high).to(tl.bfloat16).to(tl.float32)
    low = x - high - middle
    column = tl.arange(0, _COLUMNS)[None, :]
    tail = tl.where(column == 1, middle[:, None], tl.where(column == 2, low[:, None], 0.0))
    return tl.where(column == 0, high[:, None], tail).to(tl.bfloat16)


@triton.jit(do_not_specialize=["heads", "tokens"])
def plain_queries_kernel(
    query,
    out,
    state_ptr,
    key_sum_ptr,
    pooled_ptr,
    heads,
    tokens,
    eps,
    WIDTH: tl.constexpr,
    TILE_S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """query and out: descriptors of (B, H, S, WIDTH), of which out writes no row beyond the end.

    state (B, H, D, D), key_sum (B, H, D) and pooled (B, H, M, D) contiguous fp32, D = WIDTH. The grid is that of
    `queries_kernel`.
    """
    pair = tl.program_id(0)
    batch, head = pair // heads, pair % heads
    pooled_ptr += pair.to(tl.int64) * tl.cdiv(tokens, BLOCK) * WIDTH
    state_ptr += pair.to(tl.int64) * (WIDTH * WIDTH)
    TILES: tl.constexpr = BLOCK // TILE_S

    channels = tl.arange(0, WIDTH)
    state = tl.load(state_ptr + channels[:, None] * WIDTH + channels[None, :]).to(tl.bfloat16)
    key_sum = _three_columns(tl.load(key_sum_ptr + pair * WIDTH + channels))
    total = tl.zeros([WIDTH, _COLUMNS], tl.float32)
    first, stop = blocks_of_program(tokens, BLOCK)
    for tile in range(first * TILES, stop * TILES):
        q = _load_rows(query, batch, head, tile * TILE_S, TILE_S, WIDTH)
        total = _pool_tile(pooled_ptr, total, q, tile, tokens, WIDTH, TILE_S, BLOCK)
        features = tl.maximum(q.to(tl.float32), 0.0).to(q.dtype)
        inverse = 1.0 / (tl.sum(tl.dot(features, key_sum), 1) + eps)
        rows = (tl.dot(features, state) * inverse[:, None]).to(q.dtype)
        out.store([batch, head, tile * TILE_S, 0], rows.reshape([1, 1, TILE_S, WIDTH]))
