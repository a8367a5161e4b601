"""Host side of the means of pools on the Triton engine: allocations, grids, launches. Reads no tensor's values."""

from __future__ import annotations

import torch

from ..capability import next_power, padded_head_dim
from ..launch import launch
from ..layout import block_count, empty_bshd, has_aligned_rows, mask_bytes, row_strides, with_dense_rows
from .triton_means import block_means_kernel, row_means_kernel

_ROWS = 32  # of a tile that is loaded at once
_TILES = 2  # on their way at once, so that enough programs fit into the registers


def tail_means(
    x: torch.Tensor,
    pool: int,
    begin: int,
    end: int,
    key_mask: torch.Tensor | None,
    block_means: torch.Tensor | None,
    block: int,
) -> torch.Tensor:
    """See `reference.tail_means`."""
    batch, heads, tokens, head_dim = x.shape
    pools = block_count(tokens, pool)
    mask = mask_bytes(key_mask)
    if block_means is None:
        return _row_means(x, None, pool, begin, end, mask)[1]
    means = x.new_empty((batch, heads, pools, head_dim))
    launch(
        block_means_kernel,
        (batch * heads * pools,),
        x.device,
        *(block_means.contiguous(), mask, means, heads, tokens, block_means.shape[2], pools, begin, end),
        HEAD_DIM=head_dim,
        TILE_D=padded_head_dim(head_dim),
        BLOCK=block,
        EACH=pool // block,
        num_warps=1,
    )
    return means


def take_rows_with_means(
    x: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor, pool: int, begin: int, end: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.take_rows_with_means`."""
    moved, means = _row_means(x, order.contiguous(), pool, begin, end, None)
    assert moved is not None
    return moved, means


def _row_means(
    x: torch.Tensor, order: torch.Tensor | None, pool: int, begin: int, end: int, mask: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor]:
    x = with_dense_rows(x)
    batch, heads, tokens, head_dim = x.shape
    pools = block_count(tokens, pool)
    means = x.new_empty((batch, heads, pools, head_dim))
    moved = None if order is None else empty_bshd(x, batch, heads, tokens, head_dim)
    aligned = has_aligned_rows(x)  # narrow loads take registers
    rows = min(_ROWS if aligned else _ROWS // 4, next_power(pool))
    launch(
        row_means_kernel,
        (batch * heads * pools,),
        x.device,
        *(x, order, mask, moved, means, row_strides(x), row_strides(moved), heads, tokens, pools, pool, begin, end),
        HEAD_DIM=head_dim,
        TILE_D=padded_head_dim(head_dim),
        TILES=_TILES if aligned and pool > rows else 1,
        ROWS=rows,
        num_warps=4,
    )
    return moved, means
