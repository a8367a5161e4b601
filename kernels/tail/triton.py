"""Host side of the Triton engine of the tail: allocations, grids, launches. Reads no tensor's values."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch

from ..block_sparse.triton import block_sparse_attention, block_sparse_attention_backward
from ..capability import arch_of, padded_head_dim
from ..launch import launch
from ..layout import block_count, has_aligned_rows, row_strides, with_dense_rows
from . import composed
from .triton_count import count_kernel
from .triton_host import tail_means, take_rows_with_means
from .triton_kernels import merge_kernel, pool_gradient_kernel, query_gradient_kernel

__all__ = ["attend_with_tail", "attend_with_tail_backward", "count_tail", "tail_means", "take_rows_with_means"]

_PROGRAMS = 528  # four for each multiprocessor of an H200


def count_tail(
    lut: torch.Tensor,
    count: torch.Tensor,
    tokens: int,
    key_block: int,
    pool: int,
    begin: int,
    end: int,
    key_mask: torch.Tensor | None,
) -> torch.Tensor:
    """See `reference.tail_tokens`."""
    batch, heads, query_blocks, slots = lut.shape
    pools = block_count(tokens, pool)
    counted = lut.new_empty((batch, heads, query_blocks, pools), dtype=torch.float32)
    summed = None
    if key_mask is not None:
        summed = torch.nn.functional.pad(key_mask.cumsum(dim=1, dtype=torch.int32), (1, 0))
    launch(
        count_kernel,
        (query_blocks, heads, batch),
        lut.device,
        *(lut.contiguous(), count.contiguous(), summed, counted),
        *(heads, tokens, query_blocks, slots, pools, begin, end),
        KEY_BLOCK=key_block,
        POOL=pool,
        CHUNK=128,
        HAS_MASK=summed is not None,
        num_warps=1,
    )
    return counted


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
    query, pooled_key, pooled_value = (with_dense_rows(x) for x in (query, pooled_key, pooled_value))
    # on Ampere and Ada the tile of wide heads does not fit into the registers of four warps
    wide = arch_of(query.device)[0] < 9 and padded_head_dim(query.shape[-1]) > 64
    constants = _constants(query, pooled_value, query_block, warps=8 if wide else 4)
    aligned = all(has_aligned_rows(x) for x in (query, pooled_key, pooled_value, out))  # else loads take registers
    if query.dtype != torch.float32 and query_block >= 128 and aligned:
        # two halves of a tile share what is read of the pools
        constants |= {"TILE_Q": 128, "num_warps": 8, "num_stages": 3 if arch_of(query.device)[0] >= 9 else 2}
    elif arch_of(query.device)[0] != 9 and not aligned:  # rows that no copy can run ahead with: stages take registers
        constants["num_stages"] = 3 if query.dtype == torch.float32 and arch_of(query.device)[0] > 9 else 1
    joint = torch.empty_like(lse)
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
    """See `torch.merge_tail_backward`."""
    batch, heads, tokens, _ = query.shape
    pools = pooled_value.shape[2]
    constants = _constants(query, pooled_value, query_block, warps=8)  # with 4 the sums do not fit into registers
    query, pooled_key, pooled_value, out, grad_out = (
        with_dense_rows(x) for x in (query, pooled_key, pooled_value, out, grad_out)
    )
    bias, lse = bias.contiguous(), lse.contiguous()
    delta = torch.empty_like(lse)
    tiles = block_count(tokens, constants["TILE_Q"])
    launch(
        query_gradient_kernel,
        (tiles, heads, batch),
        query.device,
        *(query, pooled_key, pooled_value, bias, out, grad_out, lse, delta, grad_query),
        *(row_strides(x) for x in (query, pooled_key, pooled_value, out, grad_out, grad_query)),
        *(heads, tokens, pools, bias.shape[2], scale),
        **constants,
    )
    return pool_gradients(grad_out, query, lse, delta, pooled_key, pooled_value, bias, query_block, scale)


def pool_gradients(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    pooled_key: torch.Tensor,
    pooled_value: torch.Tensor,
    bias: torch.Tensor,
    query_block: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the pooled key and value and, fp32 (H,), of the log weights.

    The sums over queries are split, and the parts are added in a fixed order.

    Args:
        lse, delta: fp32 (B, H, S) contiguous; delta is the sum of out times its gradient over the channels.
    """
    batch, heads, tokens, head_dim = query.shape
    pools, value_dim = pooled_value.shape[2:]
    query, pooled_key, pooled_value, grad_out = (
        with_dense_rows(x) for x in (query, pooled_key, pooled_value, grad_out)
    )
    constants = _constants(query, pooled_value, query_block, warps=8)
    constants["TILE_Q"] = min(32, constants["TILE_Q"])  # two sums are held at once
    if query.dtype == torch.float32 and arch_of(query.device)[0] < 9:
        constants["num_stages"] = 1  # with 2 the assembler spills, so that more programs fit
    tiles = block_count(tokens, constants["TILE_Q"])
    of_pools = block_count(pools, constants["TILE_P"])
    each = block_count(tiles, max(1, min(tiles, _PROGRAMS // (of_pools * batch * heads))))
    splits = block_count(tiles, each)
    grad_key = query.new_empty((splits, batch, heads, pools, head_dim), dtype=torch.float32)
    grad_value = query.new_empty((splits, batch, heads, pools, value_dim), dtype=torch.float32)
    grad_bias = query.new_empty((splits, batch, heads, pools), dtype=torch.float32)
    launch(
        pool_gradient_kernel,
        (of_pools, batch * heads, splits),
        query.device,
        *(query, pooled_key, pooled_value, bias, grad_out, lse, delta, grad_key, grad_value, grad_bias),
        *(row_strides(x) for x in (query, pooled_key, pooled_value, grad_out)),
        *(heads, tokens, pools, bias.shape[2], each, scale),
        **constants,
    )
    grad_weight = grad_bias.sum(dim=(0, 1, 3))
    return grad_key.sum(0).to(pooled_key.dtype), grad_value.sum(0).to(pooled_value.dtype), grad_weight


attend_with_tail = partial(composed.attend, block_sparse_attention, merge_tail)
attend_with_tail_backward = partial(composed.gradients, block_sparse_attention_backward, merge_tail_backward)
