"""The kernel of `pool_and_summarise`: means of blocks of keys, and the sums over all tokens."""

import triton
import triton.language as tl

from ..block_sparse.triton_tiles import load_rows, token_rows
from ..linear.triton_state import SOFTMAX_UNIT
from ..linear.triton_tiles import feature_map, store_state
from .triton_pooling import blocks_of_program, pool_tile


@triton.jit(do_not_specialize=["heads", "tokens"])
def keys_kernel(
    key_ptr,
    value_ptr,
    rotated_ptr,
    order_ptr,
    mask_ptr,
    pooled_ptr,
    state_ptr,
    key_sum_ptr,
    key_stride_b,
    key_stride_h,
    key_stride_s,
    key_stride_d,
    value_stride_b,
    value_stride_h,
    value_stride_s,
    value_stride_d,
    rotated_stride_b,
    rotated_stride_h,
    rotated_stride_s,
    rotated_stride_d,
    heads,
    tokens,
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
    """pooled (B, H, M, D), state (B, H, splits, D, Dv) and key_sum (B, H, splits, D), contiguous fp32.

    mask (B, S) and order (S,) contiguous. Grid (B * H, splits): every program walks over a run of blocks, TILE_S rows,
    which divide BLOCK, at a time.
    """
    pair = tl.program_id(0).to(tl.int64)
    batch, head = pair // heads, pair % heads
    key_ptr += batch * key_stride_b + head * key_stride_h
    value_ptr += batch * value_stride_b + head * value_stride_h
    pooled_ptr += pair * tl.cdiv(tokens, BLOCK) * HEAD_DIM
    if HAS_ROTATED:
        rotated_ptr += batch * rotated_stride_b + head * rotated_stride_h
    if HAS_MASK:
        mask_ptr += batch * tokens
    SCALED: tl.constexpr = FEATURE_MAP == "softmax" and not HAS_ROTATED and key_ptr.dtype.element_ty == tl.float16
    TILES: tl.constexpr = BLOCK // TILE_S

    transposed = tl.zeros([TILE_V, TILE_D], tl.float32)  # so that the value, as it lies in memory, is the left factor
    sums = tl.zeros([TILE_D], tl.float32)
    total, seen = tl.zeros([TILE_D], tl.float32), 0
    first, stop = blocks_of_program(tokens, BLOCK)
    for tile in range(first * TILES, stop * TILES):
        positions = tile * TILE_S + tl.arange(0, TILE_S)
        valid = positions < tokens
        rows = token_rows(order_ptr, positions, valid, tokens, HAS_ORDER)
        if HAS_MASK:
            valid = valid & (tl.load(mask_ptr + rows, mask=valid, other=0) != 0)
        key = load_rows(key_ptr, rows, valid, key_stride_s, key_stride_d, HEAD_DIM, TILE_D)
        value = load_rows(value_ptr, rows, valid, value_stride_s, value_stride_d, VALUE_DIM, TILE_V)
        total, seen = pool_tile(
            pooled_ptr, total, seen, key, valid, tile, tokens, HEAD_DIM, TILE_D, TILE_S, BLOCK, HAS_MASK
        )
        features = feature_map(key.to(tl.float32), HEAD_DIM, TILE_D, FEATURE_MAP)
        if FEATURE_MAP != "relu":  # which maps the 0 of other rows to 0
            features = tl.where(valid[:, None], features, 0.0)
        sums += tl.sum(features, 0)
        if HAS_ROTATED:
            left = load_rows(rotated_ptr, rows, valid, rotated_stride_s, rotated_stride_d, HEAD_DIM, TILE_D)
            left = tl.where(valid[:, None], left, 0.0)  # through registers: see `state_kernel`
        else:
            if SCALED:
                features = features * SOFTMAX_UNIT
            left = features.to(key.dtype)
        transposed = tl.dot(tl.trans(value), left, transposed, input_precision="ieee")

    state = tl.trans(transposed)
    if SCALED:
        state = state / SOFTMAX_UNIT
    partial = pair * tl.num_programs(1) + tl.program_id(1)
    store_state(state_ptr + partial * (HEAD_DIM * VALUE_DIM), state, HEAD_DIM, VALUE_DIM, TILE_D, TILE_V)
    channels = tl.arange(0, TILE_D)
    tl.store(key_sum_ptr + partial * HEAD_DIM + channels, sums, mask=channels < HEAD_DIM)
