"""Preparing an operand: a program takes a few whole rows, and reads them twice if a norm is over all heads.

The second time they are in the cache. Heads come one group after another, so that nothing depends on how many there
are, and tables are loaded once for all.
"""

import triton
import triton.language as tl

from .triton_rows import affine, features, load, load_tables, row_scales, scales, store, store_pairs


@triton.jit(do_not_specialize=["heads", "tokens", "eps"])
def prepare_kernel(
    x_ptr,
    tables,
    weight_ptr,
    bias_ptr,
    order_ptr,
    rotated_ptr,
    plain_ptr,
    features_ptr,
    strides,
    table_strides,
    out_strides,
    heads,
    tokens,
    eps,
    HEAD_DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_P: tl.constexpr,
    ROWS: tl.constexpr,
    HALVES: tl.constexpr,
    NORM: tl.constexpr,
    OVER_WIDTH: tl.constexpr,
    PER_HEAD: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    EVEN: tl.constexpr,
    FOUR: tl.constexpr,
):
    """`reference.prepare_operand` of x with adjacent channels, without means. EVEN: all groups of heads are full."""
    batch = tl.program_id(1).to(tl.int64)
    position = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_token = (position < tokens)[:, None, None]
    row = position.to(tl.int64)
    if order_ptr is not None:
        row = tl.load(order_ptr + position, mask=position < tokens, other=0).to(tl.int64)
        row = tl.minimum(tl.maximum(row, 0), tokens - 1)  # an order that is none must not leave the tensors
    pair = tl.arange(0, TILE_P)
    if HALVES:  # channels that are not turned make pairs of neighbours
        channel = tl.where(pair < PAIRS, pair, 2 * pair)
        other = tl.where(pair < PAIRS, pair + PAIRS, 2 * pair + 1)
    else:
        channel = tl.arange(0, 2 * TILE_P)
        other = channel
    width: tl.constexpr = HEAD_DIM // 2 if HALVES else HEAD_DIM
    dtype: tl.constexpr = rotated_ptr.dtype.element_ty
    x_ptr += batch * strides[0] + row[:, None, None] * strides[2]
    kept = batch * out_strides[0] + row[:, None, None] * out_strides[2]
    moved = batch * out_strides[0] + position.to(tl.int64)[:, None, None] * out_strides[2]
    if OVER_WIDTH:
        row_mean, row_scale = row_scales(x_ptr, is_token, strides[1], heads, eps, NORM, HEAD_DIM, TILE_H, 2 * TILE_P)
    first, second, third, fourth = table_strides
    if not PER_HEAD:
        cos, sin, other_sin, other_cos = load_tables(
            tables, first, second, third, fourth, batch, row, row, pair, is_token, PER_HEAD, PAIRS, FOUR
        )

    for start in range(0, heads, TILE_H):
        head = start + tl.arange(0, TILE_H)
        inside = is_token if EVEN else is_token & (head < heads)[None, :, None]
        real = inside & (pair < HEAD_DIM // 2)[None, None, :]
        wide_head = head.to(tl.int64)
        out = head[None, :, None] * out_strides[1]
        if PER_HEAD:
            cos, sin, other_sin, other_cos = load_tables(
                tables, first, second, third, fourth, batch, row, wide_head, pair, inside, PER_HEAD, PAIRS, FOUR
            )
        ptr = x_ptr + wide_head[None, :, None] * strides[1]
        at = head[None, :, None] * (HEAD_DIM if OVER_WIDTH else 0)
        if HALVES:
            one, two = load(ptr, inside, channel, width), load(ptr, inside, other, width)
            if NORM != "none":
                if OVER_WIDTH:
                    mean, scale = row_mean, row_scale
                else:
                    mean, scale = scales(one, two, real, eps, HEAD_DIM, NORM == "layer")
                one = affine((one - mean) * scale, weight_ptr, bias_ptr, at, inside, channel, width).to(dtype)
                two = affine((two - mean) * scale, weight_ptr, bias_ptr, at, inside, other, width).to(dtype)
            if FEATURE_MAP != "":
                store_pairs(plain_ptr + kept + out, one, two, inside, channel, other, width, HALVES)
        else:
            run = load(ptr, inside, channel, width)
            if NORM != "none":
                if OVER_WIDTH:
                    mean, scale = row_mean, row_scale
                else:
                    mean, scale = scales(
                        run, None, inside & (channel < HEAD_DIM)[None, None, :], eps, HEAD_DIM, NORM == "layer"
                    )
                run = affine((run - mean) * scale, weight_ptr, bias_ptr, at, inside, channel, width)
            run = run.to(dtype)  # packed: the conversion of single numbers is slow
            if FEATURE_MAP != "":
                store(plain_ptr + kept + out, run, inside, channel, width)
            one, two = tl.split(tl.reshape(run, (ROWS, TILE_H, TILE_P, 2)))
        one, two = one.to(tl.float32), two.to(tl.float32)
        turned_one, turned_two = one * cos - two * sin, one * other_sin + two * other_cos
        store_pairs(rotated_ptr + moved + out, turned_one, turned_two, inside, channel, other, width, HALVES)
        if FEATURE_MAP != "":
            one, two = features(one, two, real, FEATURE_MAP, dtype)
            turned_one, turned_two = one * cos - two * sin, one * other_sin + two * other_cos
            store_pairs(features_ptr + kept + out, turned_one, turned_two, inside, channel, other, width, HALVES)
