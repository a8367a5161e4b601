"""The backward kernels of block-sparse attention. Both compute the weights again from lse; neither uses atomics.

With g the gradient of out and delta = sum(g * out) per query: dS = P * (g V^T - delta), dQ = scale dS K,
dK = scale dS^T Q, dV = P^T g.
"""

import triton
import triton.language as tl

from .triton_tiles import block_id, listed_blocks, load_rows, load_tile

_LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _query_step(query, grad, lse, delta, key, value, visible, acc, scale_log2):
    """What one tile of keys adds to the gradient of a tile of queries. visible: which keys are seen; None for all."""
    exponents = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2 - lse[:, None]
    if visible is not None:
        exponents = tl.where(visible[None, :], exponents, float("-inf"))
    grad_weights = tl.dot(grad, tl.trans(value), input_precision="ieee")
    grad_scores = tl.exp2(exponents) * (grad_weights - delta[:, None])
    return tl.dot(grad_scores.to(key.dtype), key, acc, input_precision="ieee")


@triton.jit
def _store_rows(ptr, tile, batch, head, heads, tokens, rows, in_range, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """Write rows of a (B, S, H, WIDTH) gradient."""
    channels = tl.arange(0, TILE)
    ptr += batch * tokens * heads * WIDTH + head * WIDTH
    writable = in_range[:, None] & (channels < WIDTH)[None, :]
    pointers = ptr + rows[:, None] * (heads * WIDTH) + channels[None, :]
    tl.store(pointers, tile.to(ptr.dtype.element_ty), mask=writable)


@triton.jit(do_not_specialize=["tokens", "slots", "query_blocks", "key_blocks"])
def query_gradient_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    out_ptr,
    grad_ptr,
    lse_ptr,
    delta_ptr,
    lse_log2_ptr,
    grad_query_ptr,
    lut_ptr,
    count_ptr,
    mask_ptr,
    query_strides,
    key_strides,
    value_strides,
    out_strides,
    grad_strides,
    heads,
    tokens,
    slots,
    query_blocks,
    key_blocks,
    scale,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    TILE_D: tl.constexpr,
    TILE_V: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    STAGES: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """grad_query (B, S, H, D) and, for the other kernel, delta and lse in base 2 (B, H, S).

    One program per tile of query rows. Where tiles are read, the pointers are tensor descriptors if DESCRIPTORS.
    """
    tile, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if not DESCRIPTORS:
        query_ptr += batch * query_strides[0] + head.to(tl.int64) * query_strides[1]
        key_ptr += batch * key_strides[0] + head.to(tl.int64) * key_strides[1]
        value_ptr += batch * value_strides[0] + head.to(tl.int64) * value_strides[1]
        out_ptr += batch * out_strides[0] + head.to(tl.int64) * out_strides[1]
        grad_ptr += batch * grad_strides[0] + head.to(tl.int64) * grad_strides[1]
    if HAS_MASK:
        mask_ptr += batch * tokens
    row = (batch * heads + head) * query_blocks + tile * TILE_Q // QUERY_BLOCK
    lut_ptr += row * slots
    blocks, everything = listed_blocks(count_ptr + row, slots, key_blocks)

    first = tile * TILE_Q
    positions = first + tl.arange(0, TILE_Q)
    in_range = positions < tokens
    query_rows = positions.to(tl.int64)
    query = load_tile(query_ptr, first, query_rows, in_range, query_strides[2], HEAD_DIM, TILE_D, DESCRIPTORS)
    out = load_tile(out_ptr, first, query_rows, in_range, out_strides[2], VALUE_DIM, TILE_V, DESCRIPTORS)
    grad = load_tile(grad_ptr, first, query_rows, in_range, grad_strides[2], VALUE_DIM, TILE_V, DESCRIPTORS)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    per_query = (batch * heads + head) * tokens + query_rows
    lse = tl.load(lse_ptr + per_query, mask=in_range, other=float("inf")) * _LOG2E
    # +inf makes the weights of a row without keys, whose lse is -inf, exp2(-inf) = 0
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    tl.store(delta_ptr + per_query, delta, mask=in_range)
    tl.store(lse_log2_ptr + per_query, lse, mask=in_range)

    acc = tl.zeros([TILE_Q, TILE_D], tl.float32)
    # The loops are those of forward_kernel, for the same reasons.
    PARTS: tl.constexpr = KEY_BLOCK // TILE_K
    UNCHECKED: tl.constexpr = DESCRIPTORS and not HAS_MASK
    final = tl.maximum(blocks - 1, 0)
    full_blocks = tokens // KEY_BLOCK
    last = block_id(lut_ptr, final, everything, key_blocks, UNCHECKED)
    ragged = (blocks > 0) & (last >= full_blocks)
    full_entries = tl.minimum(blocks - ragged.to(tl.int32), full_blocks)
    columns = tl.arange(0, TILE_K)
    upcoming = block_id(lut_ptr, 0, everything, full_blocks, UNCHECKED)
    for part in tl.range(0, full_entries * PARTS, num_stages=STAGES):
        start = upcoming * KEY_BLOCK + part % PARTS * TILE_K
        upcoming = block_id(lut_ptr, tl.minimum((part + 1) // PARTS, final), everything, full_blocks, UNCHECKED)
        key_rows = (start + columns).to(tl.int64)
        key = load_tile(key_ptr, start, key_rows, None, key_strides[2], HEAD_DIM, TILE_D, DESCRIPTORS)
        value = load_tile(value_ptr, start, key_rows, None, value_strides[2], VALUE_DIM, TILE_V, DESCRIPTORS)
        visible = tl.load(mask_ptr + key_rows) != 0 if HAS_MASK else None
        acc = _query_step(query, grad, lse, delta, key, value, visible, acc, scale_log2)
    for part in tl.range(0, ragged.to(tl.int32) * PARTS, num_stages=1):
        start = last * KEY_BLOCK + part * TILE_K
        visible = start + columns < tokens
        key_rows = (start + columns).to(tl.int64)
        key = load_tile(key_ptr, start, key_rows, visible, key_strides[2], HEAD_DIM, TILE_D, DESCRIPTORS)
        value = load_tile(value_ptr, start, key_rows, visible, value_strides[2], VALUE_DIM, TILE_V, DESCRIPTORS)
        if HAS_MASK:
            visible = visible & (tl.load(mask_ptr + key_rows, mask=visible, other=0) != 0)
        acc = _query_step(query, grad, lse, delta, key, value, visible, acc, scale_log2)

    _store_rows(grad_query_ptr, acc * scale, batch, head, heads, tokens, query_rows, in_range, HEAD_DIM, TILE_D)


@triton.jit(do_not_specialize=["tokens", "key_blocks", "capacity"])
def key_gradient_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    grad_ptr,
    lse_log2_ptr,
    delta_ptr,
    grad_key_ptr,
    grad_value_ptr,
    rows_ptr,
    start_ptr,
    mask_ptr,
    query_strides,
    key_strides,
    value_strides,
    grad_strides,
    heads,
    tokens,
    key_blocks,
    capacity,
    scale,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    TILE_D: tl.constexpr,
    TILE_V: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    STAGES: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """grad_key (B, S, H, D) and grad_value (B, S, H, Dv). One program per tile of keys, over the query blocks that
    attend to it: those that list it (inverted_index.py), then those that attend to everything."""
    tile, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    key_ptr += batch * key_strides[0] + head.to(tl.int64) * key_strides[1]
    value_ptr += batch * value_strides[0] + head.to(tl.int64) * value_strides[1]
    if not DESCRIPTORS:
        query_ptr += batch * query_strides[0] + head.to(tl.int64) * query_strides[1]
        grad_ptr += batch * grad_strides[0] + head.to(tl.int64) * grad_strides[1]
    group = batch * heads + head
    lse_log2_ptr += group * tokens
    delta_ptr += group * tokens
    # the run of this key block, and the run of the query blocks that attend to everything
    start_ptr += group * (key_blocks + 2)
    rows_ptr += group * capacity
    run = start_ptr + tile * TILE_K // KEY_BLOCK
    begin = tl.load(run)
    listed = tl.load(run + 1) - begin
    dense_begin = tl.load(start_ptr + key_blocks)
    entries = listed + tl.load(start_ptr + key_blocks + 1) - dense_begin
    # added to an entry, where it stands among rows: one number for each run
    dense_begin -= listed

    key_positions = tile * TILE_K + tl.arange(0, TILE_K)
    in_range = key_positions < tokens
    key_rows = key_positions.to(tl.int64)
    key = load_rows(key_ptr, key_rows, in_range, key_strides[2], HEAD_DIM, TILE_D)
    value = load_rows(value_ptr, key_rows, in_range, value_strides[2], VALUE_DIM, TILE_V)
    if HAS_MASK:
        visible = tl.load(mask_ptr + batch * tokens + key_rows, mask=in_range, other=0) != 0

    grad_key = tl.zeros([TILE_K, TILE_D], tl.float32)
    grad_value = tl.zeros([TILE_K, TILE_V], tl.float32)
    PARTS: tl.constexpr = QUERY_BLOCK // TILE_Q
    final = tl.maximum(entries - 1, 0)
    lines = tl.arange(0, TILE_Q)
    upcoming = tl.load(rows_ptr + tl.where(listed > 0, begin, dense_begin), mask=entries > 0, other=0)
    for part in tl.range(0, entries * PARTS, num_stages=STAGES):
        start = upcoming * QUERY_BLOCK + part % PARTS * TILE_Q
        positions = start + lines
        following = tl.minimum((part + 1) // PARTS, final)
        upcoming = tl.load(rows_ptr + following + tl.where(following < listed, begin, dense_begin))
        attends = positions < tokens
        query_rows = positions.to(tl.int64)
        query = load_tile(query_ptr, start, query_rows, attends, query_strides[2], HEAD_DIM, TILE_D, DESCRIPTORS)
        grad = load_tile(grad_ptr, start, query_rows, attends, grad_strides[2], VALUE_DIM, TILE_V, DESCRIPTORS)
        # +inf makes the weights of rows beyond the end exp2(-inf) = 0
        lse = tl.load(lse_log2_ptr + query_rows, mask=attends, other=float("inf"))
        exponents = tl.dot(key, tl.trans(query), input_precision="ieee") * scale_log2 - lse[None, :]
        if HAS_MASK:
            exponents = tl.where(visible[:, None], exponents, float("-inf"))
        weights = tl.exp2(exponents)
        grad_value = tl.dot(weights.to(grad.dtype), grad, grad_value, input_precision="ieee")
        grad_weights = tl.dot(value, tl.trans(grad), input_precision="ieee")
        delta = tl.load(delta_ptr + query_rows, mask=attends, other=0.0)
        grad_scores = weights * (grad_weights - delta[None, :])
        grad_key = tl.dot(grad_scores.to(query.dtype), query, grad_key, input_precision="ieee")

    _store_rows(grad_key_ptr, grad_key * scale, batch, head, heads, tokens, key_rows, in_range, HEAD_DIM, TILE_D)
    _store_rows(grad_value_ptr, grad_value, batch, head, heads, tokens, key_rows, in_range, VALUE_DIM, TILE_V)
