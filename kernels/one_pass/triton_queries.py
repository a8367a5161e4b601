"""The kernel of `pool_and_read`: means of blocks of queries, and linear attention read out for every query."""

import triton
import triton.language as tl

from ..block_sparse.triton_tiles import load_rows, token_rows
from ..linear.triton_tiles import feature_map, load_state, narrow_state, nonzero
from .triton_pooling import blocks_of_program, pool_tile


@triton.jit
def _read_state(x, factor, unit, divisor):
    """x @ state / divisor in the dtype of `factor`, for fp32 rows x (rows, TILE_D).

    factor, unit: the narrow state; in 16 bits transposed.

    For tensor cores the state is the left factor. As the right one it would want x in another layout than the sums over
    x do, and shared memory would serve neither well.
    """
    if factor.dtype == tl.float32:
        out = tl.dot(x, factor, input_precision="ieee") / divisor[:, None]
    else:
        if factor.dtype == tl.float16:
            x = x * unit[None, :]
            row_unit = nonzero(tl.max(tl.abs(x), 1))
            x = x / row_unit[:, None]
            divisor = divisor / row_unit
        out = tl.trans((tl.dot(factor, tl.trans(x.to(factor.dtype))) / divisor[None, :]).to(factor.dtype))
    return out


@triton.jit(do_not_specialize=["heads", "tokens"])
def queries_kernel(
    query_ptr,
    rotated_ptr,
    order_ptr,
    mask_ptr,
    state_ptr,
    key_sum_ptr,
    pooled_ptr,
    out_ptr,
    query_stride_b,
    query_stride_h,
    query_stride_s,
    query_stride_d,
    rotated_stride_b,
    rotated_stride_h,
    rotated_stride_s,
    rotated_stride_d,
    heads,
    tokens,
    eps,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    TILE_D: tl.constexpr,
    TILE_V: tl.constexpr,
    TILE_S: tl.constexpr,
    BLOCK: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_ROTATED: tl.constexpr,
):
    """state (B, H, D, Dv), key_sum (B, H, D) and pooled (B, H, M, D) contiguous fp32, out (B, S, H, Dv) contiguous.

    mask (B, S) and order (S,) contiguous. Grid (B * H, splits): every program keeps the state and walks over a run of
    blocks, TILE_S rows, which divide BLOCK, at a time.
    """
    pair = tl.program_id(0).to(tl.int64)
    batch, head = pair // heads, pair % heads
    query_ptr += batch * query_stride_b + head * query_stride_h
    out_ptr += (batch * tokens * heads + head) * VALUE_DIM
    pooled_ptr += pair * tl.cdiv(tokens, BLOCK) * HEAD_DIM
    if HAS_ROTATED:
        rotated_ptr += batch * rotated_stride_b + head * rotated_stride_h
    if HAS_MASK:
        mask_ptr += batch * tokens
    TILES: tl.constexpr = BLOCK // TILE_S

    channels, columns = tl.arange(0, TILE_D), tl.arange(0, TILE_V)
    key_sum = tl.load(key_sum_ptr + pair * HEAD_DIM + channels, mask=channels < HEAD_DIM, other=0.0)
    state = load_state(state_ptr + pair * (HEAD_DIM * VALUE_DIM), HEAD_DIM, VALUE_DIM, TILE_D, TILE_V)
    narrow, unit = narrow_state(state, query_ptr.dtype.element_ty)
    factor = narrow if narrow.dtype == tl.float32 else tl.trans(narrow)
    total, seen = tl.zeros([TILE_D], tl.float32), 0
    first, stop = blocks_of_program(tokens, BLOCK)
    for tile in range(first * TILES, stop * TILES):
        positions = tile * TILE_S + tl.arange(0, TILE_S)
        inside = positions < tokens
        rows = token_rows(order_ptr, positions, inside, tokens, HAS_ORDER)
        query = load_rows(query_ptr, rows, inside, query_stride_s, query_stride_d, HEAD_DIM, TILE_D)
        if HAS_MASK:
            valid = inside & (tl.load(mask_ptr + rows, mask=inside, other=0) != 0)
            counted = tl.where(valid[:, None], query, 0.0)
        else:
            valid, counted = inside, query
        total, seen = pool_tile(
            pooled_ptr, total, seen, counted, valid, tile, tokens, HEAD_DIM, TILE_D, TILE_S, BLOCK, HAS_MASK
        )
        features = feature_map(query.to(tl.float32), HEAD_DIM, TILE_D, FEATURE_MAP)
        denominator = tl.sum(features * key_sum[None, :], 1) + eps
        if HAS_ROTATED:
            rotated = load_rows(rotated_ptr, rows, inside, rotated_stride_s, rotated_stride_d, HEAD_DIM, TILE_D)
            out = _read_state(rotated.to(tl.float32), factor, unit, denominator)
        else:
            out = _read_state(features, factor, unit, denominator)
        pointers = out_ptr + rows[:, None] * (heads * VALUE_DIM) + columns[None, :]
        tl.store(pointers, out, mask=inside[:, None] & (columns < VALUE_DIM)[None, :])
