"""Pieces that the kernels of linear attention share: features, tiles of tokens, and products with the state.

A state is wider than 16 bits can hold. For fp16 every row of it (one per feature) is divided by its largest magnitude
before the tensor cores see it, and so is every row that meets it; the products are multiplied back in fp32. bf16 has
the range of fp32 and needs none of that.
"""

import triton
import triton.language as tl


@triton.jit
def feature_map(x, HEAD_DIM: tl.constexpr, TILE_D: tl.constexpr, FEATURE_MAP: tl.constexpr):
    """phi(x) of fp32 rows (rows, TILE_D); channels beyond HEAD_DIM, which are 0 in x, are 0 in the result as well."""
    real = tl.arange(0, TILE_D) < HEAD_DIM
    if FEATURE_MAP == "relu":
        features = tl.maximum(x, 0.0)
    elif FEATURE_MAP == "elu":
        features = tl.where(x > 0, x + 1.0, tl.exp(tl.minimum(x, 0.0)))
        if TILE_D != HEAD_DIM:
            features = tl.where(real[None, :], features, 0.0)
    else:
        if TILE_D != HEAD_DIM:
            x = tl.where(real[None, :], x, float("-inf"))
        features = tl.exp(x - tl.max(x, 1)[:, None])
        features = features / tl.sum(features, 1)[:, None]
    return features


@triton.jit
def feature_map_backward(grad, features, FEATURE_MAP: tl.constexpr):
    """Gradient of what the features were made of, from the gradient of the features."""
    if FEATURE_MAP == "relu":
        result = tl.where(features > 0, grad, 0.0)
    elif FEATURE_MAP == "elu":
        result = grad * tl.minimum(features, 1.0)
    else:
        result = features * (grad - tl.sum(grad * features, 1)[:, None])
    return result


@triton.jit
def run_of_tiles(tokens, TILE_S: tl.constexpr):
    """First and last + 1 of the token tiles of this program: programs along y share them evenly."""
    tiles = tl.cdiv(tokens, TILE_S)
    split, splits = tl.program_id(1), tl.num_programs(1)
    return split * tiles // splits, (split + 1) * tiles // splits


@triton.jit
def valid_rows(mask_ptr, start, tokens, TILE_S: tl.constexpr, HAS_MASK: tl.constexpr):
    """Which rows of the tile at token `start` are tokens, and not masked. mask_ptr: of this batch entry."""
    positions = start + tl.arange(0, TILE_S)
    valid = positions < tokens
    if HAS_MASK:
        valid = valid & (tl.load(mask_ptr + positions, mask=valid, other=0) != 0)
    return valid


@triton.jit
def load_tile(ptr, start, valid, stride, TILE_S: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """(TILE_S, TILE) rows from token `start` on; 0 in rows that are not valid and in channels beyond WIDTH."""
    channels = tl.arange(0, TILE)
    ptr += start.to(tl.int64) * stride
    pointers = ptr + tl.arange(0, TILE_S).to(tl.int64)[:, None] * stride + channels[None, :]
    if WIDTH == TILE:
        tile = tl.load(pointers, mask=valid[:, None], other=0.0)
    else:
        tile = tl.load(pointers, mask=valid[:, None] & (channels < WIDTH)[None, :], other=0.0)
    return tile


@triton.jit
def store_tile(ptr, tile, start, tokens, stride_s, TILE_S: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """Write the rows of a tile that are tokens; channels are adjacent in memory."""
    rows, channels = tl.arange(0, TILE_S), tl.arange(0, TILE)
    ptr += start.to(tl.int64) * stride_s
    mask = (rows < tokens - start)[:, None]
    if WIDTH != TILE:
        mask = mask & (channels < WIDTH)[None, :]
    tl.store(ptr + rows.to(tl.int64)[:, None] * stride_s + channels[None, :], tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_state(state_ptr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, TILE_D: tl.constexpr, TILE_V: tl.constexpr):
    """A contiguous fp32 (HEAD_DIM, VALUE_DIM) matrix, 0 beyond it."""
    rows, columns = tl.arange(0, TILE_D), tl.arange(0, TILE_V)
    inside = (rows < HEAD_DIM)[:, None] & (columns < VALUE_DIM)[None, :]
    return tl.load(state_ptr + rows[:, None] * VALUE_DIM + columns[None, :], mask=inside, other=0.0)


@triton.jit
def store_state(
    state_ptr, state, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, TILE_D: tl.constexpr, TILE_V: tl.constexpr
):
    """The opposite of `load_state`."""
    rows, columns = tl.arange(0, TILE_D), tl.arange(0, TILE_V)
    inside = (rows < HEAD_DIM)[:, None] & (columns < VALUE_DIM)[None, :]
    tl.store(state_ptr + rows[:, None] * VALUE_DIM + columns[None, :], state, mask=inside)


@triton.jit
def nonzero(x):
    """x, with 1 in the place of 0: a divisor."""
    return tl.where(x == 0.0, 1.0, x)


@triton.jit
def narrow_state(state, dtype: tl.constexpr):
    """The fp32 state as (TILE_D, TILE_V) of dtype, and what its rows were divided by (TILE_D)."""
    if dtype == tl.float16:
        unit = nonzero(tl.max(tl.abs(state), 1))
        state = state / unit[:, None]
    else:
        unit = tl.full([state.shape[0]], 1.0, tl.float32)
    return state.to(dtype), unit


@triton.jit
def times_state(x, narrow, unit):
    """x @ state for fp32 rows x (rows, TILE_D), in fp32."""
    if narrow.dtype == tl.float16:
        x = x * unit[None, :]
        row_unit = nonzero(tl.max(tl.abs(x), 1))
        x = (x / row_unit[:, None]).to(tl.float16)
        product = tl.dot(x, narrow) * row_unit[:, None]
    else:
        product = tl.dot(x.to(narrow.dtype), narrow, input_precision="ieee")
    return product


@triton.jit
def times_transposed_state(tile, transposed, unit):
    """tile @ state^T for rows (rows, TILE_V) in the dtype of `transposed`, in fp32.

    transposed: tl.trans(narrow), taken before the loop over tiles: inside, it is copied to shared memory every time.
    """
    product = tl.dot(tile, transposed, input_precision="ieee")
    if transposed.dtype == tl.float16:
        product = product * unit[None, :]
    return product
