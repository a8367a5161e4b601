"""The Triton kernels of the tail. Each program walks over pools, or over queries, with the softmax of both together.

The forward starts where sparse attention ended: its result and its lse are the state of an online softmax.
"""

import triton
import triton.language as tl

from ..block_sparse.triton_tiles import load_rows

_LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
_LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _scores(query, key, bias, scale_log2):
    """Scores of a tile of queries and a tile of pools in base 2. bias: of the pools, of one query block."""
    return tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2 + (bias * _LOG2E)[None, :]


@triton.jit
def _load_reference(lse_ptr, rows, in_range):
    """lse in base 2; +inf for a row that has nothing, whose weights then are 0."""
    lse = tl.load(lse_ptr + rows, mask=in_range, other=float("-inf")) * _LOG2E
    return tl.where(lse == float("-inf"), float("inf"), lse)


@triton.jit(do_not_specialize=["tokens", "pools", "query_blocks"])
def merge_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    bias_ptr,
    out_ptr,
    lse_ptr,
    joint_ptr,
    query_strides,
    key_strides,
    value_strides,
    out_strides,
    heads,
    tokens,
    pools,
    query_blocks,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    TILE_D: tl.constexpr,
    TILE_V: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_P: tl.constexpr,
):
    """out (B, H, S, Dv), in place; lse and joint (B, H, S), bias (B, H, Mq, P) contiguous."""
    tile, head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    query_ptr += batch * query_strides[0] + head * query_strides[1]
    key_ptr += batch * key_strides[0] + head * key_strides[1]
    value_ptr += batch * value_strides[0] + head * value_strides[1]
    out_ptr += batch * out_strides[0] + head * out_strides[1]
    bias_ptr += ((batch * heads + head) * query_blocks + tile * TILE_Q // QUERY_BLOCK) * pools
    rows = (tile * TILE_Q + tl.arange(0, TILE_Q)).to(tl.int64)
    in_range = rows < tokens
    per_query = (batch * heads + head) * tokens + rows

    query = load_rows(query_ptr, rows, in_range, query_strides[2], HEAD_DIM, TILE_D)
    acc = load_rows(out_ptr, rows, in_range, out_strides[2], VALUE_DIM, TILE_V).to(tl.float32)
    highest = tl.load(lse_ptr + per_query, mask=in_range, other=float("-inf")) * _LOG2E
    total = tl.where(highest == float("-inf"), 0.0, 1.0)
    columns = tl.arange(0, TILE_P)
    for first in tl.range(0, pools, TILE_P):
        pool = first + columns
        exists = pool < pools
        key = load_rows(key_ptr, pool.to(tl.int64), exists, key_strides[2], HEAD_DIM, TILE_D)
        bias = tl.load(bias_ptr + pool, mask=exists, other=float("-inf"))
        scores = _scores(query, key, bias, scale_log2)
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        reference = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        weights = tl.exp2(scores - reference[:, None])
        correction = tl.exp2(highest - reference)
        total = total * correction + tl.sum(weights, 1)
        highest = new_highest
        value = load_rows(value_ptr, pool.to(tl.int64), exists, value_strides[2], VALUE_DIM, TILE_V)
        acc = tl.dot(weights.to(value.dtype), value, acc * correction[:, None], input_precision="ieee")

    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    joint = tl.where(empty, float("-inf"), (highest + tl.log2(total)) * _LN2)
    tl.store(joint_ptr + per_query, joint, mask=in_range)
    channels = tl.arange(0, TILE_V)
    pointers = out_ptr + rows[:, None] * out_strides[2] + channels[None, :]
    tl.store(pointers, acc.to(out_ptr.dtype.element_ty), mask=in_range[:, None] & (channels < VALUE_DIM)[None, :])


@triton.jit(do_not_specialize=["tokens", "pools", "query_blocks"])
def query_gradient_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    bias_ptr,
    out_ptr,
    grad_ptr,
    lse_ptr,
    delta_ptr,
    grad_query_ptr,
    query_strides,
    key_strides,
    value_strides,
    out_strides,
    grad_strides,
    grad_query_strides,
    heads,
    tokens,
    pools,
    query_blocks,
    scale,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    TILE_D: tl.constexpr,
    TILE_V: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_P: tl.constexpr,
):
    """Adds to grad_query (B, H, S, D); writes delta (B, H, S)."""
    tile, head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    query_ptr += batch * query_strides[0] + head * query_strides[1]
    key_ptr += batch * key_strides[0] + head * key_strides[1]
    value_ptr += batch * value_strides[0] + head * value_strides[1]
    out_ptr += batch * out_strides[0] + head * out_strides[1]
    grad_ptr += batch * grad_strides[0] + head * grad_strides[1]
    grad_query_ptr += batch * grad_query_strides[0] + head * grad_query_strides[1]
    bias_ptr += ((batch * heads + head) * query_blocks + tile * TILE_Q // QUERY_BLOCK) * pools
    rows = (tile * TILE_Q + tl.arange(0, TILE_Q)).to(tl.int64)
    in_range = rows < tokens
    per_query = (batch * heads + head) * tokens + rows

    query = load_rows(query_ptr, rows, in_range, query_strides[2], HEAD_DIM, TILE_D)
    out = load_rows(out_ptr, rows, in_range, out_strides[2], VALUE_DIM, TILE_V)
    grad = load_rows(grad_ptr, rows, in_range, grad_strides[2], VALUE_DIM, TILE_V)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    tl.store(delta_ptr + per_query, delta, mask=in_range)
    reference = _load_reference(lse_ptr, per_query, in_range)
    acc = tl.zeros([TILE_Q, TILE_D], tl.float32)
    columns = tl.arange(0, TILE_P)
    for first in tl.range(0, pools, TILE_P):
        pool = first + columns
        exists = pool < pools
        key = load_rows(key_ptr, pool.to(tl.int64), exists, key_strides[2], HEAD_DIM, TILE_D)
        value = load_rows(value_ptr, pool.to(tl.int64), exists, value_strides[2], VALUE_DIM, TILE_V)
        bias = tl.load(bias_ptr + pool, mask=exists, other=float("-inf"))
        weights = tl.exp2(_scores(query, key, bias, scale * _LOG2E) - reference[:, None])
        grad_weights = tl.dot(grad, tl.trans(value), input_precision="ieee")
        grad_scores = weights * (grad_weights - delta[:, None])
        acc = tl.dot(grad_scores.to(key.dtype), key, acc, input_precision="ieee")
    channels = tl.arange(0, TILE_D)
    pointers = grad_query_ptr + rows[:, None] * grad_query_strides[2] + channels[None, :]
    writable = in_range[:, None] & (channels < HEAD_DIM)[None, :]
    before = tl.load(pointers, mask=writable, other=0.0).to(tl.float32)
    tl.store(pointers, (before + acc * scale).to(grad_query_ptr.dtype.element_ty), mask=writable)


@triton.jit(do_not_specialize=["tokens", "pools", "query_blocks", "tiles_each"])
def pool_gradient_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    bias_ptr,
    grad_ptr,
    lse_ptr,
    delta_ptr,
    grad_key_ptr,
    grad_value_ptr,
    grad_bias_ptr,
    query_strides,
    key_strides,
    value_strides,
    grad_strides,
    heads,
    tokens,
    pools,
    query_blocks,
    tiles_each,
    scale,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    TILE_D: tl.constexpr,
    TILE_V: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_P: tl.constexpr,
):
    """grad_key and grad_value, fp32 (splits, B * H, P, D), and grad_bias (splits, B * H, P), all contiguous.

    Each split sums over `tiles_each` query tiles.
    """
    head = tl.program_id(1).to(tl.int64) % heads
    batch = tl.program_id(1).to(tl.int64) // heads
    split = tl.program_id(2).to(tl.int64)
    query_ptr += batch * query_strides[0] + head * query_strides[1]
    key_ptr += batch * key_strides[0] + head * key_strides[1]
    value_ptr += batch * value_strides[0] + head * value_strides[1]
    grad_ptr += batch * grad_strides[0] + head * grad_strides[1]
    bias_ptr += (batch * heads + head) * query_blocks * pools
    pool = tl.program_id(0) * TILE_P + tl.arange(0, TILE_P)
    exists = pool < pools
    key = load_rows(key_ptr, pool.to(tl.int64), exists, key_strides[2], HEAD_DIM, TILE_D)
    value = load_rows(value_ptr, pool.to(tl.int64), exists, value_strides[2], VALUE_DIM, TILE_V)
    grad_key = tl.zeros([TILE_P, TILE_D], tl.float32)
    grad_value = tl.zeros([TILE_P, TILE_V], tl.float32)
    grad_bias = tl.zeros([TILE_P], tl.float32)
    for tile in tl.range(split * tiles_each, (split + 1) * tiles_each):
        rows = (tile * TILE_Q + tl.arange(0, TILE_Q)).to(tl.int64)
        in_range = rows < tokens
        query = load_rows(query_ptr, rows, in_range, query_strides[2], HEAD_DIM, TILE_D)
        grad = load_rows(grad_ptr, rows, in_range, grad_strides[2], VALUE_DIM, TILE_V)
        per_query = (batch * heads + head) * tokens + rows
        reference = _load_reference(lse_ptr, per_query, in_range)
        delta = tl.load(delta_ptr + per_query, mask=in_range, other=0.0)
        # a tile behind the end has no query block: its rows have no weight, whatever is read for it
        block = tl.minimum(tile * TILE_Q // QUERY_BLOCK, query_blocks - 1)
        bias = tl.load(bias_ptr + block * pools + pool, mask=exists, other=float("-inf"))
        # pools are rows here: products whose left operand comes from registers must not transpose it
        scores = tl.dot(key, tl.trans(query), input_precision="ieee") * (scale * _LOG2E) + (bias * _LOG2E)[:, None]
        weights = tl.exp2(scores - reference[None, :])
        grad_value = tl.dot(weights.to(grad.dtype), grad, grad_value, input_precision="ieee")
        grad_weights = tl.dot(value, tl.trans(grad), input_precision="ieee")
        grad_scores = weights * (grad_weights - delta[None, :])
        grad_key = tl.dot(grad_scores.to(query.dtype), query, grad_key, input_precision="ieee")
        grad_bias += tl.sum(grad_scores, 1)
    at = (split * tl.num_programs(1) + tl.program_id(1)) * pools + pool
    tl.store(grad_bias_ptr + at, grad_bias, mask=exists)
    at = at[:, None]
    channels, widths = tl.arange(0, TILE_D)[None, :], tl.arange(0, TILE_V)[None, :]
    tl.store(grad_key_ptr + at * HEAD_DIM + channels, grad_key * scale, mask=exists[:, None] & (channels < HEAD_DIM))
    tl.store(grad_value_ptr + at * VALUE_DIM + widths, grad_value, mask=exists[:, None] & (widths < VALUE_DIM))
