"""Preparing an operand: a program takes whole rows, so that a norm over all heads needs no second read of them."""

import triton
import triton.language as tl


@triton.jit
def _load_pairs(ptr, inside, first, second, TILE_P: tl.constexpr, HEAD_DIM: tl.constexpr, HALVES: tl.constexpr):
    """Both channels of each pair as fp32 (rows, heads, pairs), 0 where there are none.

    ptr: of channel 0, and inside: whether there is one, (rows, heads, 1). Interleaved channels come in one run, so that
    16 bytes are read at once.
    """
    if HALVES:
        valid = inside & (tl.arange(0, TILE_P) < HEAD_DIM // 2)[None, None, :]
        one = tl.load(ptr + first[None, None, :], mask=valid, other=0.0).to(tl.float32)
        two = tl.load(ptr + second[None, None, :], mask=valid, other=0.0).to(tl.float32)
    else:
        channel = tl.arange(0, 2 * TILE_P)
        valid = inside & (channel < HEAD_DIM)[None, None, :]
        run = tl.load(ptr + channel[None, None, :], mask=valid, other=0.0)
        one, two = tl.split(tl.reshape(run, (run.shape[0], run.shape[1], TILE_P, 2)))
        one, two = one.to(tl.float32), two.to(tl.float32)
    return one, two


@triton.jit
def _store_pairs(ptr, one, two, inside, first, second, HEAD_DIM: tl.constexpr, HALVES: tl.constexpr):
    """The opposite of `_load_pairs`."""
    pairs: tl.constexpr = one.shape[2]
    one, two = one.to(ptr.dtype.element_ty), two.to(ptr.dtype.element_ty)
    if HALVES:
        valid = inside & (tl.arange(0, pairs) < HEAD_DIM // 2)[None, None, :]
        tl.store(ptr + first[None, None, :], one, mask=valid)
        tl.store(ptr + second[None, None, :], two, mask=valid)
    else:
        channel = tl.arange(0, 2 * pairs)
        run = tl.reshape(tl.join(one, two), (one.shape[0], one.shape[1], 2 * pairs))
        tl.store(ptr + channel[None, None, :], run, mask=inside & (channel < HEAD_DIM)[None, None, :])


@triton.jit
def _total(one, two, OVER_WIDTH: tl.constexpr):
    """Sum over the channels of a head, or of all heads, kept as axes of size 1."""
    total = tl.sum(one + two, 2)
    return tl.sum(total, 1)[:, None, None] if OVER_WIDTH else total[:, :, None]


@triton.jit
def _normalised(
    one,
    two,
    weight_ptr,
    bias_ptr,
    head,
    heads,
    eps,
    real,
    first,
    second,
    TILE_P: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALVES: tl.constexpr,
    NORM: tl.constexpr,
    OVER_WIDTH: tl.constexpr,
):
    """Pairs (rows, heads, pairs) after the norm, fp32. real: which of the pairs there are."""
    channels = HEAD_DIM * heads if OVER_WIDTH else HEAD_DIM
    if NORM == "layer":
        mean = _total(one, two, OVER_WIDTH) / channels
        one, two = tl.where(real, one - mean, 0.0), tl.where(real, two - mean, 0.0)
    scale = tl.rsqrt(_total(one * one, two * two, OVER_WIDTH) / channels + eps)
    one, two = one * scale, two * scale
    # loaded for each tile: registers are scarce, and these stay in the cache
    at, in_head = head[None, :, None] * (HEAD_DIM if OVER_WIDTH else 0), (head < heads)[None, :, None]
    if weight_ptr is not None:
        by_one, by_two = _load_pairs(weight_ptr + at, in_head, first, second, TILE_P, HEAD_DIM, HALVES)
        one, two = one * by_one, two * by_two
    if bias_ptr is not None:
        by_one, by_two = _load_pairs(bias_ptr + at, in_head, first, second, TILE_P, HEAD_DIM, HALVES)
        one, two = one + by_one, two + by_two
    return one, two


@triton.jit
def _load_table(ptr, rows, heads, pair, valid, strides, other, PER_HEAD: tl.constexpr, PAIRS: tl.constexpr):
    """fp32 (rows, heads or 1, pairs) of a table. ptr: of this batch entry. Pairs that are not turned get `other`."""
    ptr += rows[:, None, None] * strides[2] + pair[None, None, :] * strides[3]
    valid = valid & (pair < PAIRS)[None, None, :]
    if PER_HEAD:
        ptr += heads[None, :, None] * strides[1]
    return tl.load(ptr, mask=valid, other=other).to(tl.float32)


@triton.jit
def _features(one, two, real, FEATURE_MAP: tl.constexpr):
    """phi of fp32 pairs (rows, heads, pairs). real: which of the pairs there are."""
    if FEATURE_MAP == "relu":
        one, two = tl.maximum(one, 0.0), tl.maximum(two, 0.0)
    elif FEATURE_MAP == "elu":
        one = tl.where(one > 0, one + 1.0, tl.exp(tl.minimum(one, 0.0)))
        two = tl.where(two > 0, two + 1.0, tl.exp(tl.minimum(two, 0.0)))
    else:
        most = tl.max(tl.where(real, tl.maximum(one, two), float("-inf")), 2)[:, :, None]
        one = tl.where(real, tl.exp(one - most), 0.0)
        two = tl.where(real, tl.exp(two - most), 0.0)
        total = tl.sum(one + two, 2)[:, :, None]
        total = tl.where(total == 0.0, 1.0, total)  # of heads that are not there
        one, two = one / total, two / total
    return one, two


@triton.jit(do_not_specialize=["heads", "tokens", "blocks", "eps"])
def prepare_kernel(
    x_ptr,
    tables,
    weight_ptr,
    bias_ptr,
    order_ptr,
    rotated_ptr,
    plain_ptr,
    features_ptr,
    means_ptr,
    strides,
    table_strides,
    out_strides,
    heads,
    tokens,
    blocks,
    eps,
    HEAD_DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_P: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    HALVES: tl.constexpr,
    NORM: tl.constexpr,
    OVER_WIDTH: tl.constexpr,
    PER_HEAD: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    HAS_MEANS: tl.constexpr,
):
    """`reference.prepare_operand` of x with adjacent channels. A program takes STEPS tiles of ROWS rows."""
    run, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    head = tl.program_id(1) * TILE_H + tl.arange(0, TILE_H)
    pair = tl.arange(0, TILE_P)
    first, second = 2 * pair, 2 * pair + 1
    if HALVES:  # channels that are not turned make pairs of neighbours
        first, second = tl.where(pair < PAIRS, pair, first), tl.where(pair < PAIRS, pair + PAIRS, second)
    real = (head < heads)[None, :, None] & (pair < HEAD_DIM // 2)[None, None, :]
    in_head = (head < heads)[None, :, None]
    wide_head = head.to(tl.int64)
    x_ptr += batch * strides[0] + wide_head[None, :, None] * strides[1]
    out = batch * out_strides[0] + wide_head[None, :, None] * out_strides[1]
    dtype: tl.constexpr = rotated_ptr.dtype.element_ty
    if HAS_MEANS:
        sum_one = tl.zeros((ROWS, TILE_H, TILE_P), tl.float32)
        sum_two = tl.zeros((ROWS, TILE_H, TILE_P), tl.float32)

    for step in range(STEPS):
        position = (run * STEPS + step) * ROWS + tl.arange(0, ROWS)
        is_token = position < tokens
        row = position.to(tl.int64)
        if order_ptr is not None:
            row = tl.load(order_ptr + position, mask=is_token, other=0).to(tl.int64)
            # an order that is none must not leave the tensors
            row = tl.minimum(tl.maximum(row, 0), tokens - 1)
        inside = is_token[:, None, None] & in_head
        from_ptr = x_ptr + row[:, None, None] * strides[2]
        one, two = _load_pairs(from_ptr, inside, first, second, TILE_P, HEAD_DIM, HALVES)

        if NORM != "none":
            one, two = _normalised(
                *(one, two, weight_ptr, bias_ptr, head, heads, eps, real, first, second),
                *(TILE_P, HEAD_DIM, HALVES, NORM, OVER_WIDTH),
            )
            one, two = one.to(dtype).to(tl.float32), two.to(dtype).to(tl.float32)

        on_table = inside if PER_HEAD else is_token[:, None, None]
        base = tables[0] + batch * table_strides[0][0]
        cos = _load_table(base, row, wide_head, pair, on_table, table_strides[0], 1.0, PER_HEAD, PAIRS)
        base = tables[1] + batch * table_strides[1][0]
        sin = _load_table(base, row, wide_head, pair, on_table, table_strides[1], 0.0, PER_HEAD, PAIRS)
        other_sin, other_cos = sin, cos
        if len(tables) == 4:
            base = tables[2] + batch * table_strides[2][0]
            other_sin = _load_table(base, row, wide_head, pair, on_table, table_strides[2], 0.0, PER_HEAD, PAIRS)
            base = tables[3] + batch * table_strides[3][0]
            other_cos = _load_table(base, row, wide_head, pair, on_table, table_strides[3], 1.0, PER_HEAD, PAIRS)

        if FEATURE_MAP != "":
            at = out + row[:, None, None] * out_strides[2]
            _store_pairs(plain_ptr + at, one, two, inside, first, second, HEAD_DIM, HALVES)
            phi_one, phi_two = _features(one, two, real, FEATURE_MAP)
            phi_one, phi_two = phi_one.to(dtype).to(tl.float32), phi_two.to(dtype).to(tl.float32)
            turned_one = phi_one * cos - phi_two * sin
            turned_two = phi_one * other_sin + phi_two * other_cos
            _store_pairs(features_ptr + at, turned_one, turned_two, inside, first, second, HEAD_DIM, HALVES)
        turned_one, turned_two = one * cos - two * sin, one * other_sin + two * other_cos
        at = out + position.to(tl.int64)[:, None, None] * out_strides[2]
        _store_pairs(rotated_ptr + at, turned_one, turned_two, inside, first, second, HEAD_DIM, HALVES)
        if HAS_MEANS:
            sum_one += tl.where(inside, turned_one.to(dtype).to(tl.float32), 0.0)
            sum_two += tl.where(inside, turned_two.to(dtype).to(tl.float32), 0.0)

    if HAS_MEANS:
        seen = tl.minimum(tokens - run * STEPS * ROWS, STEPS * ROWS).to(tl.float32)
        mean_one, mean_two = tl.sum(sum_one, 0)[None, :, :] / seen, tl.sum(sum_two, 0)[None, :, :] / seen
        means_ptr += ((batch * heads + wide_head[None, :, None]) * blocks + run) * HEAD_DIM
        _store_pairs(means_ptr, mean_one, mean_two, in_head, first, second, HEAD_DIM, HALVES)
