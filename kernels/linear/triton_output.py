"""Kernels of `linear_output`: every query reads the state, and the gradients of query, rotated query and state."""

import triton
import triton.language as tl

from .triton_tiles import (
    feature_map,
    feature_map_backward,
    load_state,
    load_tile,
    narrow_state,
    nonzero,
    run_of_tiles,
    store_state,
    store_tile,
    times_state,
    times_transposed_state,
    valid_rows,
)


@triton.jit(do_not_specialize=["heads", "tokens"])
def output_kernel(
    query_ptr,
    rotated_ptr,
    state_ptr,
    key_sum_ptr,
    out_ptr,
    query_strides,
    rotated_strides,
    heads,
    tokens,
    eps,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    TILE_D: tl.constexpr,
    TILE_V: tl.constexpr,
    TILE_S: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    HAS_ROTATED: tl.constexpr,
):
    """state (B, H, D, Dv) and key_sum (B, H, D) contiguous fp32, out (B, S, H, Dv) contiguous.

    Grid (B * H, splits): every program keeps the state and walks over a run of token tiles.
    """
    pair = tl.program_id(0).to(tl.int64)
    batch, head = pair // heads, pair % heads
    query_ptr += batch * query_strides[0] + head * query_strides[1]
    out_ptr += (batch * tokens * heads + head) * VALUE_DIM
    if HAS_ROTATED:
        rotated_ptr += batch * rotated_strides[0] + head * rotated_strides[1]

    channels = tl.arange(0, TILE_D)
    key_sum = tl.load(key_sum_ptr + pair * HEAD_DIM + channels, mask=channels < HEAD_DIM, other=0.0)
    state = load_state(state_ptr + pair * (HEAD_DIM * VALUE_DIM), HEAD_DIM, VALUE_DIM, TILE_D, TILE_V)
    narrow, unit = narrow_state(state, query_ptr.dtype.element_ty)
    first, stop = run_of_tiles(tokens, TILE_S)
    for tile in range(first, stop):
        start = tile * TILE_S
        valid = valid_rows(None, start, tokens, TILE_S, False)
        query = load_tile(query_ptr, start, valid, query_strides[2], TILE_S, HEAD_DIM, TILE_D)
        features = feature_map(query.to(tl.float32), HEAD_DIM, TILE_D, FEATURE_MAP)
        denominator = tl.sum(features * key_sum[None, :], 1) + eps
        if HAS_ROTATED:
            rotated = load_tile(rotated_ptr, start, valid, rotated_strides[2], TILE_S, HEAD_DIM, TILE_D)
            numerator = times_state(rotated.to(tl.float32), narrow, unit)
        else:
            numerator = times_state(features, narrow, unit)
        out = numerator / denominator[:, None]
        store_tile(out_ptr, out, start, tokens, heads * VALUE_DIM, TILE_S, VALUE_DIM, TILE_V)


@triton.jit
def _add_product(grad, right, total, unit):
    """total += grad^T @ right for fp32 rows `right`. In fp16 total is in units that grow with the largest right."""
    if grad.dtype == tl.float16:
        largest = tl.maximum(unit, tl.max(tl.max(tl.abs(right), 1), 0))
        total = total * (unit / nonzero(largest))
        unit = largest
        right = right / nonzero(unit)
    return tl.dot(tl.trans(grad), right.to(grad.dtype), total, input_precision="ieee"), unit


@triton.jit(do_not_specialize=["heads", "tokens"])
def output_backward_kernel(
    grad_out_ptr,
    query_ptr,
    rotated_ptr,
    state_ptr,
    key_sum_ptr,
    grad_query_ptr,
    grad_rotated_ptr,
    grad_state_ptr,
    grad_key_sum_ptr,
    grad_out_strides,
    query_strides,
    rotated_strides,
    heads,
    tokens,
    eps,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    TILE_D: tl.constexpr,
    TILE_V: tl.constexpr,
    TILE_S: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    HAS_ROTATED: tl.constexpr,
):
    """With s = a.z + eps and w = KV g: da = w / s + ds z, ds = -(w.a) / s^2, dKV = sum a (g / s)^T, dz = sum ds a.

    w / s and ds z nearly cancel where all values have a common mean. So this works on KV - z m^T, where m is about the
    mean output: what is taken off is put back exactly, and 16 bits hold the rest. With rotation nothing cancels: w / s
    is the gradient of the rotated query, ds = -(w . rotated query) / s^2 and da = ds z.

    state, key_sum, grad_query and grad_rotated as in `output_kernel`, grad_state (B, H, splits, D, Dv) and grad_key_sum
    (B, H, splits, D) contiguous fp32. Grid (B * H, splits).
    """
    pair = tl.program_id(0).to(tl.int64)
    batch, head = pair // heads, pair % heads
    grad_out_ptr += batch * grad_out_strides[0] + head * grad_out_strides[1]
    query_ptr += batch * query_strides[0] + head * query_strides[1]
    grad_query_ptr += (batch * tokens * heads + head) * HEAD_DIM
    if HAS_ROTATED:
        rotated_ptr += batch * rotated_strides[0] + head * rotated_strides[1]
        grad_rotated_ptr += (batch * tokens * heads + head) * HEAD_DIM

    channels = tl.arange(0, TILE_D)
    key_sum = tl.load(key_sum_ptr + pair * HEAD_DIM + channels, mask=channels < HEAD_DIM, other=0.0)
    state = load_state(state_ptr + pair * (HEAD_DIM * VALUE_DIM), HEAD_DIM, VALUE_DIM, TILE_D, TILE_V)
    if not HAS_ROTATED:
        mean = tl.sum(state, 0) / nonzero(tl.sum(tl.abs(key_sum), 0))
        state -= key_sum[:, None] * mean[None, :]
    narrow, unit = narrow_state(state, query_ptr.dtype.element_ty)
    narrow_transposed = tl.trans(narrow)

    transposed = tl.zeros([TILE_V, TILE_D], tl.float32)
    grad_unit = 0.0
    grad_sums = tl.zeros([TILE_S // 16, 8, TILE_D], tl.float32)
    first, stop = run_of_tiles(tokens, TILE_S)
    for tile in range(first, stop):
        start = tile * TILE_S
        valid = valid_rows(None, start, tokens, TILE_S, False)
        grad = load_tile(grad_out_ptr, start, valid, grad_out_strides[2], TILE_S, VALUE_DIM, TILE_V)
        query = load_tile(query_ptr, start, valid, query_strides[2], TILE_S, HEAD_DIM, TILE_D)
        if not HAS_ROTATED:
            along_mean = tl.sum(grad.to(tl.float32) * mean[None, :], 1)
        features = feature_map(query.to(tl.float32), HEAD_DIM, TILE_D, FEATURE_MAP)
        reached = tl.sum(features * key_sum[None, :], 1)
        inverse = 1.0 / (reached + eps)
        if HAS_ROTATED:
            left = load_tile(rotated_ptr, start, valid, rotated_strides[2], TILE_S, HEAD_DIM, TILE_D).to(tl.float32)
        else:
            left = features
        transposed, grad_unit = _add_product(grad, left * inverse[:, None], transposed, grad_unit)
        weight = times_transposed_state(grad, narrow_transposed, unit)
        if HAS_ROTATED:
            grad_denominator = -tl.sum(weight * left, 1) * inverse * inverse
            store_tile(
                grad_rotated_ptr, weight * inverse[:, None], start, tokens, heads * HEAD_DIM, TILE_S, HEAD_DIM, TILE_D
            )
            grad_features = grad_denominator[:, None] * key_sum[None, :]
        else:
            along_rest = tl.sum(weight * features, 1)
            grad_denominator = -(along_rest + along_mean * reached) * inverse * inverse
            remaining = (along_mean * eps - along_rest) * inverse
            grad_features = (weight + remaining[:, None] * key_sum[None, :]) * inverse[:, None]
        # rows beyond the last token have gradients 0, so neither sum sees them
        grad_sums += tl.sum(tl.reshape(features * grad_denominator[:, None], [TILE_S // 16, 2, 8, TILE_D]), 1)
        grad_query = feature_map_backward(grad_features, features, FEATURE_MAP)
        store_tile(grad_query_ptr, grad_query, start, tokens, heads * HEAD_DIM, TILE_S, HEAD_DIM, TILE_D)

    grad_state = tl.trans(transposed)
    grad_sum = tl.sum(tl.sum(grad_sums, 0), 0)
    if query_ptr.dtype.element_ty == tl.float16:
        grad_state = grad_state * grad_unit
    partial = pair * tl.num_programs(1) + tl.program_id(1)
    store_state(grad_state_ptr + partial * (HEAD_DIM * VALUE_DIM), grad_state, HEAD_DIM, VALUE_DIM, TILE_D, TILE_V)
    tl.store(grad_key_sum_ptr + partial * HEAD_DIM + channels, grad_sum, mask=channels < HEAD_DIM)
