"""The forward kernel of block-sparse attention: one program per tile of query rows, over its list of key blocks."""

import triton
import triton.language as tl

from .triton_tiles import block_id, listed_blocks, load_tile

_LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def _weigh(scores, total, highest, scale_log2, MASKED: tl.constexpr):
    """One step of the online softmax, in base 2: weights of a tile, and what the sums so far are multiplied by.

    Scores are scaled in fp32 after the product: scaling the inputs in 16 bits is wrong where scores are large.
    """
    new_highest = tl.maximum(highest, tl.max(scores, 1) * scale_log2)
    # a row that has seen no key yet: -inf - -inf would be NaN
    reference = tl.where(new_highest == float("-inf"), 0.0, new_highest) if MASKED else new_highest
    weights = tl.exp2(scores * scale_log2 - reference[:, None])
    correction = tl.exp2(highest - reference)
    return weights, correction, total * correction + tl.sum(weights, 1), new_highest


@triton.jit(do_not_specialize=["tokens", "slots", "query_blocks", "key_blocks"])
def forward_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    out_ptr,
    lse_ptr,
    lut_ptr,
    count_ptr,
    mask_ptr,
    query_strides,
    key_strides,
    value_strides,
    heads,
    tokens,
    slots,
    query_blocks,
    key_blocks,
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
    """out (B, S, H, Dv) and lse (B, H, S) contiguous; lut (B, H, Mq, K), count (B, H, Mq), mask (B, S) contiguous.

    query_ptr, key_ptr and value_ptr are tensor descriptors if DESCRIPTORS.
    """
    tile, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if not DESCRIPTORS:
        query_ptr += batch * query_strides[0] + head.to(tl.int64) * query_strides[1]
        key_ptr += batch * key_strides[0] + head.to(tl.int64) * key_strides[1]
        value_ptr += batch * value_strides[0] + head.to(tl.int64) * value_strides[1]
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

    acc = tl.zeros([TILE_Q, TILE_V], tl.float32)
    total = tl.zeros([TILE_Q], tl.float32)
    highest = tl.full([TILE_Q], float("-inf"), tl.float32)

    # Only the last key block can be short, and lists ascend: it is the last of a list or not in it. It gets code of its
    # own: a mask, or a branch, in the loop over full blocks costs more than that.
    PARTS: tl.constexpr = KEY_BLOCK // TILE_K
    UNCHECKED: tl.constexpr = DESCRIPTORS and not HAS_MASK
    final = tl.maximum(blocks - 1, 0)
    full_blocks = tokens // KEY_BLOCK
    last = block_id(lut_ptr, final, everything, key_blocks, UNCHECKED)
    ragged = (blocks > 0) & (last >= full_blocks)
    full_entries = tl.minimum(blocks - ragged.to(tl.int32), full_blocks)
    columns = tl.arange(0, TILE_K)
    # The next id is fetched one step ahead: a load whose address waits for another load comes late.
    upcoming = block_id(lut_ptr, 0, everything, full_blocks, UNCHECKED)
    for part in tl.range(0, full_entries * PARTS, num_stages=STAGES):
        start = upcoming * KEY_BLOCK + part % PARTS * TILE_K
        upcoming = block_id(lut_ptr, tl.minimum((part + 1) // PARTS, final), everything, full_blocks, UNCHECKED)
        key_rows = (start + columns).to(tl.int64)
        key = load_tile(key_ptr, start, key_rows, None, key_strides[2], HEAD_DIM, TILE_D, DESCRIPTORS)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")
        if HAS_MASK:
            scores = tl.where((tl.load(mask_ptr + key_rows) != 0)[None, :], scores, float("-inf"))
        weights, correction, total, highest = _weigh(scores, total, highest, scale_log2, HAS_MASK)
        value = load_tile(value_ptr, start, key_rows, None, value_strides[2], VALUE_DIM, TILE_V, DESCRIPTORS)
        acc = tl.dot(weights.to(value.dtype), value, acc * correction[:, None], input_precision="ieee")
    for part in tl.range(0, ragged.to(tl.int32) * PARTS, num_stages=1):
        start = last * KEY_BLOCK + part * TILE_K
        visible = start + columns < tokens
        key_rows = (start + columns).to(tl.int64)
        key = load_tile(key_ptr, start, key_rows, visible, key_strides[2], HEAD_DIM, TILE_D, DESCRIPTORS)
        value = load_tile(value_ptr, start, key_rows, visible, value_strides[2], VALUE_DIM, TILE_V, DESCRIPTORS)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")
        if HAS_MASK:
            visible = visible & (tl.load(mask_ptr + key_rows, mask=visible, other=0) != 0)
        scores = tl.where(visible[None, :], scores, float("-inf"))
        weights, correction, total, highest = _weigh(scores, total, highest, scale_log2, True)
        acc = tl.dot(weights.to(value.dtype), value, acc * correction[:, None], input_precision="ieee")

    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    lse = tl.where(empty, float("-inf"), (highest + tl.log2(total)) * _LN2)
    tl.store(lse_ptr + (batch * heads + head) * tokens + query_rows, lse, mask=in_range)
    channels = tl.arange(0, TILE_V)
    out_ptr += batch * tokens * heads * VALUE_DIM + head * VALUE_DIM
    out_rows = query_rows[:, None] * (heads * VALUE_DIM)
    writable = in_range[:, None] & (channels < VALUE_DIM)[None, :]
    tl.store(out_ptr + out_rows + channels[None, :], acc.to(out_ptr.dtype.element_ty), mask=writable)
