"""Host side of the Triton engine of the tail: allocations, grids, launches. Reads no tensor's values."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..capability import arch_of, padded_head_dim
from ..launch import launch
from ..layout import block_count, row_strides, with_dense_rows
from .triton_kernels import merge_kernel, pool_gradient_kernel, query_gradient_kernel

_PROGRAMS = 528  # four for each multiprocessor of an H200


def _constants(query: torch.Tensor, pooled_value: torch.Tensor, query_block: int, warps: int = 4) -> dict[str, Any]:
    head_dim, value_dim = query.shape[-1], pooled_value.shape[-1]
    # fp32 products run on the plain arithmetic units: small tiles, or the accumulators do not fit into registers
    tile = 16 if query.dtype == torch.float32 else 64
    return {
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "TILE_D": padded_head_dim(head_dim),
        "TILE_V": padded_head_dim(value_dim),
        "QUERY_BLOCK": query_block,
        "TILE_Q": min(tile, query_block),
        "TILE_P": tile,
        "num_warps": warps,
        "num_stages": 2,
    }


def merge_tail(
    query: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    pooled_key: torch.Tensor,
    pooled_value: torch.Tensor,
    bias: torch.Tensor,
    query_block: int,
    scale: float,
) -> torch.Tensor:
    """See `torch.merge_tail`."""
    batch, heads, tokens, _ = query.shape
    # on Ampere and Ada the tile of wide heads does not fit into the registers of four warps
    wide = arch_of(query.device)[0] < 9 and padded_head_dim(query.shape[-1]) > 64
    constants = _constants(query, pooled_value, query_block, warps=8 if wide else 4)
    joint = torch.empty_like(lse)
    query, pooled_key, pooled_value = (with_dense_rows(x) for x in (query, pooled_key, pooled_value))
    launch(
        merge_kernel,
        (block_count(tokens, constants["TILE_Q"]), heads, batch),
        query.device,
        *(query, pooled_key, pooled_value, bias.contiguous(), out, lse, joint),
        *(row_strides(x) for x in (query, pooled_key, pooled_value, out)),
        *(heads, tokens, pooled_key.shape[2], bias.shape[2], scale * math.log2(math.e)),
        **constants,
    )
    return joint


def merge_tail_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    pooled_key: torch.Tensor,
    pooled_value: torch.Tensor,
    bias: torch.Tensor,
    query_block: int,
    scale: float,
    grad_query: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `torch.merge_tail_backward`. The sums over queries are split, and the parts are added in a fixed order."""
    batch, heads, tokens, head_dim = query.shape
    pools, value_dim = pooled_value.shape[2:]
    constants = _constants(query, pooled_value, query_block, warps=8)  # with 4 the sums do not fit into registers
    query, pooled_key, pooled_value, out, grad_out = (
        with_dense_rows(x) for x in (query, pooled_key, pooled_value, out, grad_out)
    )
    bias, lse = bias.contiguous(), lse.contiguous()
    delta, grad_row = torch.empty_like(lse), torch.empty_like(lse)
    tiles = block_count(tokens, constants["TILE_Q"])
    launch(
        query_gradient_kernel,
        (tiles, heads, batch),
        query.device,
        *(query, pooled_key, pooled_value, bias, out, grad_out, lse, delta, grad_row, grad_query),
        *(row_strides(x) for x in (query, pooled_key, pooled_value, out, grad_out, grad_query)),
        *(heads, tokens, pools, bias.shape[2], scale),
        **constants,
    )
    constants["TILE_Q"] = min(32, constants["TILE_Q"])  # two sums are held at once
    tiles = block_count(tokens, constants["TILE_Q"])
    of_pools = block_count(pools, constants["TILE_P"])
    each = block_count(tiles, max(1, min(tiles, _PROGRAMS // (of_pools * batch * heads))))
    splits = block_count(tiles, each)
    grad_key = query.new_empty((splits, batch, heads, pools, head_dim), dtype=torch.float32)
    grad_value = query.new_empty((splits, batch, heads, pools, value_dim), dtype=torch.float32)
    launch(
        pool_gradient_kernel,
        (of_pools, batch * heads, splits),
        query.device,
        *(query, pooled_key, pooled_value, bias, grad_out, lse, delta, grad_key, grad_value),
        *(row_strides(x) for x in (query, pooled_key, pooled_value, grad_out)),
        *(heads, tokens, pools, bias.shape[2], each, scale),
        **constants,
    )
    return grad_key.sum(0).to(pooled_key.dtype), grad_value.sum(0).to(pooled_value.dtype), grad_row
