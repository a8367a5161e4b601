"""The softmax over cells, twice: once for its denominators, once for the mass of each block. No score is stored."""

import triton
import triton.language as tl


@triton.jit
def _rows(rows_ptr, places, valid, TILE_D: tl.constexpr):
    """(N, TILE_D) rows; zeros where there are none."""
    pointers = rows_ptr + places.to(tl.int64)[:, None] * TILE_D + tl.arange(0, TILE_D)[None, :]
    return tl.load(pointers, mask=valid[:, None], other=0.0)


@triton.jit
def _product(key, query):
    """(K, D) x (N, D) -> fp32 (K, N)."""
    if key.dtype == tl.float32:  # the other way round: what stays for a loop would be kept in registers
        return tl.trans(tl.dot(query, tl.trans(key), input_precision="ieee"))
    return tl.dot(key, tl.trans(query))


@triton.jit(do_not_specialize=["query_rows", "key_rows", "query_stride", "key_stride"])
def denominators_kernel(
    query_ptr,
    query_factor_ptr,
    query_held_ptr,
    key_ptr,
    key_factor_ptr,
    key_held_ptr,
    lse_ptr,
    query_rows,
    key_rows,
    query_stride,
    key_stride,
    TILE_D: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """lse fp32 (B * H, query rows): in base 2, minus the logarithm of the row's own tokens; inf for one without any.

    The rows of a head begin a stride behind those of the head before; see `rows_kernel`.
    """
    head = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * TILE_Q + tl.arange(0, TILE_Q)
    query_factor_ptr += head * query_stride
    query_held_ptr += head * query_stride
    key_ptr += head * key_stride * TILE_D
    key_factor_ptr += head * key_stride
    key_held_ptr += head * key_stride
    query = _rows(query_ptr + head * query_stride * TILE_D, rows, rows < query_rows, TILE_D)
    factor = tl.load(query_factor_ptr + rows, mask=rows < query_rows, other=0.0)

    largest = tl.full((TILE_Q,), float("-inf"), tl.float32)
    total = tl.zeros((TILE_Q,), tl.float32)
    for start in range(0, key_rows, TILE_K):
        columns = start + tl.arange(0, TILE_K)
        key = _rows(key_ptr, columns, columns < key_rows, TILE_D)
        key_factor = tl.load(key_factor_ptr + columns, mask=columns < key_rows, other=0.0)
        key_held = tl.load(key_held_ptr + columns, mask=columns < key_rows, other=float("-inf"))
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * key_factor[None, :]
        scores = scores * factor[:, None] + key_held[None, :]
        until = tl.maximum(largest, tl.max(scores, 1))
        reference = tl.where(until == float("-inf"), 0.0, until)  # nothing yet
        total = total * tl.exp2(largest - reference) + tl.sum(tl.exp2(scores - reference[:, None]), 1)
        largest = until
    held = tl.load(query_held_ptr + rows, mask=rows < query_rows, other=0.0)
    tl.store(lse_ptr + head * query_rows + rows, largest + tl.log2(total) - held, mask=rows < query_rows)


@triton.jit(do_not_specialize=["query_blocks", "key_blocks", "width"])
def masses_kernel(
    query_ptr,
    query_factor_ptr,
    key_ptr,
    key_factor_ptr,
    key_held_ptr,
    lse_ptr,
    scores_ptr,
    query_blocks,
    key_blocks,
    width,
    QUERY_CELLS: tl.constexpr,
    KEY_CELLS: tl.constexpr,
    BY_ERROR: tl.constexpr,
    TILE_D: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """scores fp32 (heads, Mq, width): TILE_Q query blocks and TILE_K key blocks of one head.

    A product is one cell of TILE_K key blocks times TOGETHER cells of TILE_Q query blocks. Its columns are ordered by
    cell first (`rows_kernel`): what is added up, over cells of either, lies in the same thread.
    """
    head = tl.program_id(2).to(tl.int64)
    blocks = tl.program_id(1) * TILE_Q + tl.arange(0, TILE_Q)
    keys = tl.program_id(0) * TILE_K + tl.arange(0, TILE_K)
    inside, within = blocks < query_blocks, keys < key_blocks
    of_query, of_key = head * (QUERY_CELLS + BY_ERROR) * query_blocks, head * (KEY_CELLS + BY_ERROR) * key_blocks
    query_ptr += of_query * TILE_D
    query_factor_ptr += of_query
    key_ptr += of_key * TILE_D
    key_factor_ptr += of_key
    key_held_ptr += of_key
    lse_ptr += head * QUERY_CELLS * query_blocks

    columns = tl.arange(0, TOGETHER * TILE_Q)
    of_columns = tl.program_id(1) * TILE_Q + columns % TILE_Q
    found = tl.zeros((TILE_K, TILE_Q), tl.float32)
    for first in range(0, QUERY_CELLS, TOGETHER):
        places = (first + columns // TILE_Q) * query_blocks + of_columns
        there = of_columns < query_blocks
        query = _rows(query_ptr, places, there, TILE_D)
        factor = tl.load(query_factor_ptr + places, mask=there, other=0.0)
        lse = tl.load(lse_ptr + places, mask=there, other=0.0)
        for cell in range(KEY_CELLS):
            key_places = cell * key_blocks + keys
            key = _rows(key_ptr, key_places, within, TILE_D)
            key_factor = tl.load(key_factor_ptr + key_places, mask=within, other=0.0)
            held = tl.load(key_held_ptr + key_places, mask=within, other=0.0)
            scores = _product(key, query) * key_factor[:, None]
            shares = tl.exp2(scores * factor[None, :] + held[:, None] - lse[None, :])
            found += tl.sum(tl.reshape(shares, (TILE_K, TOGETHER, TILE_Q)), 1)
    if BY_ERROR:
        places, key_places = QUERY_CELLS * query_blocks + blocks, KEY_CELLS * key_blocks + keys
        query, key = _rows(query_ptr, places, inside, TILE_D), _rows(key_ptr, key_places, within, TILE_D)
        factor = tl.load(query_factor_ptr + places, mask=inside, other=0.0)
        key_factor = tl.load(key_factor_ptr + key_places, mask=within, other=0.0)
        hidden = _product(key, query) * key_factor[:, None]
        found *= tl.sqrt(hidden) * tl.sqrt(factor)[None, :]
    pointers = scores_ptr + (head * query_blocks + blocks[None, :]) * width + keys[:, None]
    tl.store(pointers, found, mask=within[:, None] & inside[None, :])
