"""Pieces of the kernel that prepares operands: rows, tables, norms, features."""

import triton
import triton.language as tl


@triton.jit
def load(ptr, inside, channel, WIDTH: tl.constexpr):
    """fp32 (rows, heads, channels), 0 where there is nothing. ptr: of channel 0, and inside, (rows, heads, 1).

    channel: as many offsets as a power of two, of which the first WIDTH count.
    """
    if channel.shape[0] != WIDTH:
        inside = inside & (tl.arange(0, channel.shape[0]) < WIDTH)[None, None, :]
    return tl.load(ptr + channel[None, None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store(ptr, tile, inside, channel, WIDTH: tl.constexpr):
    """The opposite of `load`."""
    if channel.shape[0] != WIDTH:
        inside = inside & (tl.arange(0, channel.shape[0]) < WIDTH)[None, None, :]
    tl.store(ptr + channel[None, None, :], tile.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def store_pairs(ptr, one, two, inside, channel, other, WIDTH: tl.constexpr, HALVES: tl.constexpr):
    """Both channels of each pair, side by side or each with its half."""
    one, two = one.to(ptr.dtype.element_ty), two.to(ptr.dtype.element_ty)
    if HALVES:
        store(ptr, one, inside, channel, WIDTH)
        store(ptr, two, inside, other, WIDTH)
    else:
        run = tl.reshape(tl.join(one, two), (one.shape[0], one.shape[1], channel.shape[0]))
        store(ptr, run, inside, channel, WIDTH)


@triton.jit
def load_table(ptr, row, head, pair, inside, strides, other, PER_HEAD: tl.constexpr, PAIRS: tl.constexpr):
    """fp32 (rows, heads or 1, pairs) of a table. ptr: of this batch entry. Pairs that are not turned get `other`."""
    ptr += row[:, None, None] * strides[2] + pair[None, None, :] * strides[3]
    if PER_HEAD:
        ptr += head[None, :, None] * strides[1]
    return tl.load(ptr, mask=inside & (pair < PAIRS)[None, None, :], other=other).to(tl.float32)


@triton.jit
def load_tables(
    tables,
    first,
    second,
    third,
    fourth,
    batch,
    row,
    head,
    pair,
    inside,
    PER_HEAD: tl.constexpr,
    PAIRS: tl.constexpr,
    FOUR: tl.constexpr,
):
    """cos and sin, and those of second channels if they are others."""
    cos = load_table(tables[0] + batch * first[0], row, head, pair, inside, first, 1.0, PER_HEAD, PAIRS)
    sin = load_table(tables[1] + batch * second[0], row, head, pair, inside, second, 0.0, PER_HEAD, PAIRS)
    other_sin, other_cos = sin, cos
    if FOUR:
        other_sin = load_table(tables[2] + batch * third[0], row, head, pair, inside, third, 0.0, PER_HEAD, PAIRS)
        other_cos = load_table(tables[3] + batch * fourth[0], row, head, pair, inside, fourth, 1.0, PER_HEAD, PAIRS)
    return cos, sin, other_sin, other_cos


@triton.jit
def features(one, two, real, FEATURE_MAP: tl.constexpr, dtype: tl.constexpr):
    """phi of fp32 pairs (rows, heads, pairs), rounded. real: which of the pairs there are."""
    if FEATURE_MAP == "relu":
        one, two = tl.maximum(one, 0.0), tl.maximum(two, 0.0)  # of what is rounded
    else:
        if FEATURE_MAP == "elu":
            one = tl.where(one > 0, one + 1.0, tl.exp(tl.minimum(one, 0.0)))
            two = tl.where(two > 0, two + 1.0, tl.exp(tl.minimum(two, 0.0)))
        else:
            most = tl.max(tl.where(real, tl.maximum(one, two), float("-inf")), 2)[:, :, None]
            one, two = tl.where(real, tl.exp(one - most), 0.0), tl.where(real, tl.exp(two - most), 0.0)
            total = tl.sum(one + two, 2)[:, :, None]
            one, two = one / total, two / total
        one, two = one.to(dtype).to(tl.float32), two.to(dtype).to(tl.float32)
    return one, two


@triton.jit
def affine(tile, weight_ptr, bias_ptr, at, inside, channel, WIDTH: tl.constexpr):
    """A normalised tile times the weight of each channel, with its bias. at: where those of a head begin.

    Loaded for each row, out of the cache: as one row of all, they would come in another layout, through shared memory.
    """
    at = tl.broadcast_to(at, (tile.shape[0], tile.shape[1], 1))
    if weight_ptr is not None:
        tile *= load(weight_ptr + at, inside, channel, WIDTH)
    if bias_ptr is not None:
        tile += load(bias_ptr + at, inside, channel, WIDTH)
    return tile


@triton.jit
def moment(
    ptr,
    is_token,
    mean,
    stride_h,
    heads,
    HEAD_DIM: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_D: tl.constexpr,
    SQUARED: tl.constexpr,
):
    """Mean over all heads of rows, or of the square of their distance to a mean (None for 0): fp32 (rows, 1, 1)."""
    channel = tl.arange(0, TILE_D)
    total = tl.zeros((is_token.shape[0], TILE_H, TILE_D), tl.float32)
    for start in range(0, heads, TILE_H):
        head = start + tl.arange(0, TILE_H)
        inside = is_token & (head < heads)[None, :, None]
        tile = load(ptr + head.to(tl.int64)[None, :, None] * stride_h, inside, channel, HEAD_DIM)
        if SQUARED:
            if mean is not None:
                tile = tl.where(inside & (channel < HEAD_DIM)[None, None, :], tile - mean, 0.0)
            tile *= tile
        total += tile
    return (tl.sum(tl.sum(total, 2), 1) / (heads * HEAD_DIM))[:, None, None]


@triton.jit
def row_scales(
    ptr,
    is_token,
    stride_h,
    heads,
    eps,
    NORM: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_D: tl.constexpr,
):
    """Mean (0 unless NORM is "layer") and inverse root of the mean square of all heads' channels: (rows, 1, 1)."""
    mean = tl.zeros((is_token.shape[0], 1, 1), tl.float32)
    if NORM == "layer":
        mean = moment(ptr, is_token, None, stride_h, heads, HEAD_DIM, TILE_H, TILE_D, False)
        square = moment(ptr, is_token, mean, stride_h, heads, HEAD_DIM, TILE_H, TILE_D, True)
    else:
        square = moment(ptr, is_token, None, stride_h, heads, HEAD_DIM, TILE_H, TILE_D, True)
    return mean, tl.rsqrt(square + eps)


@triton.jit
def scales(one, two, real, eps, HEAD_DIM: tl.constexpr, CENTRED: tl.constexpr):
    """Mean (0 if not CENTRED) and inverse root of the mean square of each head's channels: (rows, heads, 1).

    two: None, or the other half of the channels. real: which of the channels there are.
    """
    mean = tl.zeros((one.shape[0], one.shape[1], 1), tl.float32)
    if CENTRED:
        total = tl.sum(one, 2) if two is None else tl.sum(one + two, 2)
        mean = total[:, :, None] / HEAD_DIM
        one = tl.where(real, one - mean, 0.0)
        if two is not None:
            two = tl.where(real, two - mean, 0.0)
    square = tl.sum(one * one, 2) if two is None else tl.sum(one * one + two * two, 2)
    return mean, tl.rsqrt(square[:, :, None] / HEAD_DIM + eps)
