"""Orders of the tokens of a video's grid (specification 4.1).

A token order is an int32 permutation of the native positions (t * H + y) * W + x. Blocks of attention are runs of
consecutive tokens in it, so a good order keeps runs of 64 and 128 tokens compact: near to the run's centre.

:func:`tile_order` walks along columns of 4 frames x 4 rows x all of the width, slice after slice, there and back. A run
may begin anywhere in a column and is compact. Cubes one after another are not: behind the first border cube that is not
full, every run is torn between two cubes. docs/kernels.md has the table.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TypeAlias

import torch
from torch import Tensor

from salad_compile.grid.sizes import Grid

OrderOf: TypeAlias = "Callable[..., Tensor]"
"""Makes an order of a grid's tokens: `make(grid, device=...)`."""

TILE = (4, 4)
CACHED_ORDERS = 8


def tile_order(grid: Grid, tile: tuple[int, int] = TILE, *, device: torch.device | str | int | None = None) -> Tensor:
    """The order that walks along columns of the grid, there and back, slice after slice.

    A column is `tile` = (frames, rows) thick and as long as the width; frames and rows are shared out evenly among
    columns of about that thickness. A clip with fewer frames than that gets more rows per column. The next column is a
    neighbour, and begins where the last one ended. A run of 64 tokens is a cube of 4 x 4 x 4 where nothing is in the
    way. Any grid will do. Traces with symbolic sizes.

    Args:
        grid: (T, H, W), each 1 or more (unchecked, see :func:`salad_compile.grid.sizes.check_grid`).
        device: where to put the order; None is torch's default device.

    Returns:
        int32 (T * H * W,): order[i] is the native position of the i-th token.
    """
    frames, rows, width = grid
    native = torch.arange(frames * rows * width, dtype=torch.int64, device=device)
    t, y, x = native // (rows * width), native // width % rows, native % width
    thick, high = tile
    high = high * (2 * thick - min(frames, thick)) // thick
    slabs, columns = _parts(frames, thick), _parts(rows, high)
    slab, column = t * slabs // frames, y * columns // rows
    # The digits of where a token's slice is. A digit runs backwards wherever the digits before it make an odd number.
    column = slab * columns + _there_and_back(column, columns, slab)
    place = column * width + _there_and_back(x, width, column)
    return torch.argsort(place * (frames * rows * width) + native).to(torch.int32)


def _parts(size: int, edge: int) -> int:
    """How many parts of about `edge` there are in `size`: rounded, and at least one."""
    return max((2 * size + edge) // (2 * edge), 1)


def _there_and_back(digit: Tensor, count: int, before: Tensor) -> Tensor:
    return torch.where(before % 2 == 1, count - 1 - digit, digit)


def temporal_order(grid: Grid, *, device: torch.device | str | int | None = None) -> Tensor:
    """All frames of a place one after another: token (t, y, x) is number (y * W + x) * T + t (specification 4.1).

    Returns:
        int32 (T * H * W,), like :func:`tile_order`. Traces with symbolic sizes.
    """
    frames, rows, width = grid
    position = torch.arange(frames * rows * width, dtype=torch.int64, device=device)
    return (position % frames * (rows * width) + position // frames).to(torch.int32)


def order_and_inverse(make: OrderOf, grid: Grid, *, device: torch.device | str | int | None = None) -> Tensor:
    """int32 (2, T * H * W): the order, and below it the inverse permutation. Traces with symbolic sizes.

    Args:
        make: :func:`tile_order` or :func:`temporal_order`.
    """
    order = make(grid, device=device)
    return torch.stack((order, torch.argsort(order).to(torch.int32)))


def cached_order(make: OrderOf, grid: Grid, device: torch.device | str | int) -> Tensor:
    """:func:`order_and_inverse`, computed once per grid and device. Do not write into the result.

    The cache is for real tensors in uncompiled code. While something compiles, under any mode that makes other tensors
    (`FakeTensorMode`), with symbolic sizes and while a CUDA graph is captured it is neither read nor written.
    """
    if torch.compiler.is_compiling() or not all(type(edge) is int for edge in grid):
        return order_and_inverse(make, grid, device=device)
    # What tensors are like here, and the index of a plain "cuda".
    sample = torch.empty(0, device=device)
    if type(sample) is not Tensor or (sample.is_cuda and torch.cuda.is_current_stream_capturing()):
        return order_and_inverse(make, grid, device=device)
    return _stored_order(make, tuple(grid), sample.device)


@lru_cache(maxsize=CACHED_ORDERS)
def _stored_order(make: OrderOf, grid: Grid, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # autograd refuses tensors that were made in inference mode
        return order_and_inverse(make, grid, device=device)


def joint_order(order: Tensor, text_tokens: int, text_first: bool) -> Tensor:
    """The order of a joint sequence: the video's tokens in their order, then the text's.

    Args:
        order: int32 (V,), the order of the video's tokens among themselves.
        text_tokens: number of text tokens, 0 or more.
        text_first: whether the native sequence is [text, video] or [video, text].

    Returns:
        int32 (V + text_tokens,), native positions. Traces with symbolic sizes, and runs on `fx.Proxy` arguments.
    """
    begin = 0 if text_first else order.shape[0]
    text = torch.arange(begin, begin + text_tokens, dtype=torch.int32, device=order.device)
    return torch.cat((order + text_tokens if text_first else order, text))
