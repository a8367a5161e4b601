"""Host side of the Triton engine of prepared operands: allocations, grid, launch. Reads no tensor's values."""

from __future__ import annotations

import torch

from ..launch import launch
from ..layout import block_count, empty_bshd, row_strides, with_dense_rows
from ..linear.absent import absent
from ..preparation import Preparation
from ..routing.triton import pool_blocks
from .tiling import Tiling
from .triton_kernels import prepare_kernel


def prepare_operand(
    x: torch.Tensor, preparation: Preparation
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `reference.prepare_operand`."""
    tables, pairs, norm, over, eps, feature_map, block, weight, bias, order, _ = preparation
    x = with_dense_rows(x)
    batch, heads, tokens, head_dim = x.shape
    over_width = norm != "none" and over == "width"
    tiling = Tiling.of(heads, head_dim, x.dtype)
    rotated = empty_bshd(x, batch, heads, tokens, head_dim)
    plain, features = (torch.empty_like(rotated) if feature_map else absent(x) for _ in range(2))
    per_head = any(table.shape[1] > 1 for table in tables)
    views = [table.expand(batch, heads if per_head else 1, tokens, -1) for table in tables]
    views = views if len(views) == 4 else [*views, *views[::-1]]  # the kernel has one signature
    launch(
        prepare_kernel,
        (block_count(tokens, tiling.rows), batch),
        x.device,
        *(x, tuple(views), *(None if given is None else given.contiguous() for given in (weight, bias, order))),
        *(rotated, plain, features, row_strides(x), tuple(view.stride() for view in views)),
        *(row_strides(rotated), heads, tokens, eps),
        HEAD_DIM=head_dim,
        PAIRS=tables[0].shape[-1],
        TILE_H=tiling.heads,
        TILE_P=tiling.pairs,
        ROWS=tiling.rows,
        HALVES=pairs == "halves",
        NORM=norm,
        OVER_WIDTH=over_width,
        PER_HEAD=per_head,
        FEATURE_MAP=feature_map,
        EVEN=heads % tiling.heads == 0,
        FOUR=len(tables) == 4,
        num_warps=tiling.warps,
        maxnreg=tiling.registers,
    )
    means = pool_blocks(rotated, block) if block else x.new_empty((0,), dtype=torch.float32)
    return rotated, plain, features, means
