"""Kernels of `linear_state`: the sums over all tokens, and the gradients of key, value and rotated key."""

import triton
import triton.language as tl

from .triton_tiles import (
    feature_map,
    feature_map_backward,
    load_state,
    load_tile,
    narrow_state,
    run_of_tiles,
    store_state,
    store_tile,
    times_state,
    times_transposed_state,
    valid_rows,
)

# Features of the softmax map are at most 1. In fp16 they are kept times this, so that small ones do not vanish.
SOFTMAX_UNIT: tl.constexpr = tl.constexpr(32768.0)


@triton.jit(do_not_specialize=["heads", "tokens"])
def state_kernel(
    key_ptr,
    value_ptr,
    rotated_ptr,
    mask_ptr,
    state_ptr,
    key_sum_ptr,
    key_strides,
    value_strides,
    rotated_strides,
    heads,
    tokens,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    TILE_D: tl.constexpr,
    TILE_V: tl.constexpr,
    TILE_S: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_ROTATED: tl.constexpr,
):
    """state (B, H, splits, D, Dv) and key_sum (B, H, splits, D), contiguous fp32; mask (B, S) contiguous.

    Grid (B * H, splits): every program sums a run of token tiles.
    """
    pair = tl.program_id(0).to(tl.int64)
    batch, head = pair // heads, pair % heads
    key_ptr += batch * key_strides[0] + head * key_strides[1]
    value_ptr += batch * value_strides[0] + head * value_strides[1]
    if HAS_ROTATED:
        rotated_ptr += batch * rotated_strides[0] + head * rotated_strides[1]
    if HAS_MASK:
        mask_ptr += batch * tokens
    SCALED: tl.constexpr = FEATURE_MAP == "softmax" and not HAS_ROTATED and key_ptr.dtype.element_ty == tl.float16

    transposed = tl.zeros([TILE_V, TILE_D], tl.float32)  # so that the value, as it lies in memory, is the left factor
    sums = tl.zeros([TILE_S, TILE_D], tl.float32)
    first, stop = run_of_tiles(tokens, TILE_S)
    for tile in range(first, stop):
        start = tile * TILE_S
        valid = valid_rows(mask_ptr, start, tokens, TILE_S, HAS_MASK)
        key = load_tile(key_ptr, start, valid, key_strides[2], TILE_S, HEAD_DIM, TILE_D)
        value = load_tile(value_ptr, start, valid, value_strides[2], TILE_S, VALUE_DIM, TILE_V)
        features = feature_map(key.to(tl.float32), HEAD_DIM, TILE_D, FEATURE_MAP)
        if FEATURE_MAP != "relu":  # which maps the 0 of other rows to 0
            features = tl.where(valid[:, None], features, 0.0)
        sums += features
        if HAS_ROTATED:
            left = load_tile(rotated_ptr, start, valid, rotated_strides[2], TILE_S, HEAD_DIM, TILE_D)
            # Changes nothing but goes through registers. With both factors straight from memory Triton 3.6 leaves the
            # product in flight over the end of the loop, and the assembler then runs one after the other.
            left = tl.where(valid[:, None], left, 0.0)
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
    tl.store(key_sum_ptr + partial * HEAD_DIM + channels, tl.sum(sums, 0), mask=channels < HEAD_DIM)


@triton.jit(do_not_specialize=["heads", "tokens"])
def state_backward_kernel(
    grad_state_ptr,
    grad_key_sum_ptr,
    key_ptr,
    value_ptr,
    rotated_ptr,
    mask_ptr,
    grad_key_ptr,
    grad_value_ptr,
    grad_rotated_ptr,
    key_strides,
    value_strides,
    rotated_strides,
    heads,
    tokens,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    TILE_D: tl.constexpr,
    TILE_V: tl.constexpr,
    TILE_S: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_ROTATED: tl.constexpr,
):
    """db = dKV v + dz, dv = dKV^T b, dk = phi'(k) db; with rotation dKV v is the gradient of the rotated key instead.

    grad_state (B, H, D, Dv) and grad_key_sum (B, H, D) contiguous fp32, the other gradients contiguous (B, S, H, D).
    Grid (B * H, splits), as in `state_kernel`.
    """
    pair = tl.program_id(0).to(tl.int64)
    batch, head = pair // heads, pair % heads
    key_ptr += batch * key_strides[0] + head * key_strides[1]
    value_ptr += batch * value_strides[0] + head * value_strides[1]
    grad_key_ptr += (batch * tokens * heads + head) * HEAD_DIM
    grad_value_ptr += (batch * tokens * heads + head) * VALUE_DIM
    if HAS_ROTATED:
        rotated_ptr += batch * rotated_strides[0] + head * rotated_strides[1]
        grad_rotated_ptr += (batch * tokens * heads + head) * HEAD_DIM
    if HAS_MASK:
        mask_ptr += batch * tokens

    channels = tl.arange(0, TILE_D)
    grad_sum = tl.load(grad_key_sum_ptr + pair * HEAD_DIM + channels, mask=channels < HEAD_DIM, other=0.0)
    state = load_state(grad_state_ptr + pair * (HEAD_DIM * VALUE_DIM), HEAD_DIM, VALUE_DIM, TILE_D, TILE_V)
    narrow, unit = narrow_state(state, key_ptr.dtype.element_ty)
    narrow_transposed = tl.trans(narrow)
    first, stop = run_of_tiles(tokens, TILE_S)
    for tile in range(first, stop):
        start = tile * TILE_S
        valid = valid_rows(mask_ptr, start, tokens, TILE_S, HAS_MASK)
        key = load_tile(key_ptr, start, valid, key_strides[2], TILE_S, HEAD_DIM, TILE_D)
        value = load_tile(value_ptr, start, valid, value_strides[2], TILE_S, VALUE_DIM, TILE_V)
        grad = times_transposed_state(value, narrow_transposed, unit)
        features = feature_map(key.to(tl.float32), HEAD_DIM, TILE_D, FEATURE_MAP)
        if HAS_ROTATED:
            store_tile(grad_rotated_ptr, grad, start, tokens, heads * HEAD_DIM, TILE_S, HEAD_DIM, TILE_D)
            grad = tl.broadcast_to(grad_sum[None, :], [TILE_S, TILE_D])
        else:
            grad += grad_sum[None, :]
        grad_key = feature_map_backward(grad, features, FEATURE_MAP)
        if FEATURE_MAP != "relu":  # whose derivative is 0 at the 0 of other rows
            grad_key = tl.where(valid[:, None], grad_key, 0.0)
            features = tl.where(valid[:, None], features, 0.0)
        store_tile(grad_key_ptr, grad_key, start, tokens, heads * HEAD_DIM, TILE_S, HEAD_DIM, TILE_D)
        if HAS_ROTATED:
            rotated = load_tile(rotated_ptr, start, valid, rotated_strides[2], TILE_S, HEAD_DIM, TILE_D)
            grad_value = times_state(rotated.to(tl.float32), narrow, unit)
        else:
            grad_value = times_state(features, narrow, unit)
        store_tile(grad_value_ptr, grad_value, start, tokens, heads * VALUE_DIM, TILE_S, VALUE_DIM, TILE_V)
