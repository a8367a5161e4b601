"""Host side of the Triton engine of block-sparse attention: allocations, grids, launches. Reads no tensor's values."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from ..capability import padded_head_dim, require_supported
from ..launch import launch
from ..layout import block_count, empty_bshd
from ..tuning import choose
from .inverted_index import invert
from .tiles import Tiling, tilings
from .triton_backward import key_gradient_kernel, query_gradient_kernel
from .triton_forward import forward_kernel


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lut: torch.Tensor,
    count: torch.Tensor,
    order: torch.Tensor | None,
    query_block: int,
    key_block: int,
    scale: float,
    key_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.block_sparse_attention`."""
    _require_supported(query, value, query_block, key_block)
    if scale < 0:  # the kernels take the largest score before they scale it
        query, scale = -query, -scale
    batch, heads, tokens, _ = query.shape
    lut, count, order, key_mask = _contiguous(lut, count, order, key_mask)
    out = empty_bshd(query, batch, heads, tokens, value.shape[-1])
    lse = query.new_empty((batch, heads, tokens), dtype=torch.float32)

    def run(tiling: Tiling) -> None:
        launch(
            forward_kernel,
            (block_count(tokens, tiling.query), heads, batch),
            query.device,
            *(query, key, value, out, lse, lut, count, order, key_mask),
            *(stride for x in (query, key, value) for stride in x.stride()),
            *(heads, tokens, lut.shape[-1], lut.shape[2], block_count(tokens, key_block)),
            scale * math.log2(math.e),
            **_constants(query, value, order, key_mask, query_block, key_block, tiling),
        )

    run(_tiling("forward", query, value, query_block, key_block, order, key_mask, run))
    return out, lse


def backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    lut: torch.Tensor,
    count: torch.Tensor,
    order: torch.Tensor | None,
    query_block: int,
    key_block: int,
    scale: float,
    key_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `forward`: one kernel over the lists of the query blocks, one over the lists of the key blocks."""
    _require_supported(query, value, query_block, key_block)
    batch, heads, tokens, _ = query.shape
    lut, count, order, key_mask = _contiguous(lut, count, order, key_mask)
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    query_blocks, key_blocks = lut.shape[2], block_count(tokens, key_block)
    grad_query, grad_key, grad_value = (empty_bshd(x, *x.shape) for x in (query, key, value))

    def run_query(tiling: Tiling) -> None:
        launch(
            query_gradient_kernel,
            (block_count(tokens, tiling.query), heads, batch),
            query.device,
            *(query, key, value, out, grad_out, lse, delta, grad_query, lut, count, order, key_mask),
            *(stride for x in (query, key, value, out, grad_out) for stride in x.stride()),
            *(heads, tokens, lut.shape[-1], query_blocks, key_blocks),
            *(scale, scale * math.log2(math.e)),
            **_constants(query, value, order, key_mask, query_block, key_block, tiling),
        )

    run_query(_tiling("query_gradient", query, value, query_block, key_block, order, key_mask, run_query))
    index = invert(lut, count, key_blocks)

    def run_key(tiling: Tiling) -> None:
        launch(
            key_gradient_kernel,
            (block_count(tokens, tiling.key), heads, batch),
            query.device,
            *(query, key, value, grad_out, lse, delta, grad_key, grad_value),
            *(index.rows, index.start, index.dense_rows, index.dense_count, order, key_mask),
            *(stride for x in (query, key, value, grad_out) for stride in x.stride()),
            *(heads, tokens, query_blocks, key_blocks, index.rows.shape[-1]),
            *(scale, scale * math.log2(math.e)),
            **_constants(query, value, order, key_mask, query_block, key_block, tiling),
        )

    run_key(_tiling("key_gradient", query, value, query_block, key_block, order, key_mask, run_key))
    return grad_query, grad_key, grad_value


def _require_supported(query: torch.Tensor, value: torch.Tensor, query_block: int, key_block: int) -> None:
    require_supported(
        query.device,
        query.dtype,
        query.shape[-1],
        value.shape[-1],
        query_block=query_block,
        key_block=key_block,
    )


def _contiguous(
    lut: torch.Tensor, count: torch.Tensor, order: torch.Tensor | None, key_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    return (
        lut.contiguous(),
        count.contiguous(),
        None if order is None else order.contiguous(),
        None if key_mask is None else key_mask.contiguous().view(torch.uint8),
    )


def _constants(
    query: torch.Tensor,
    value: torch.Tensor,
    order: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    query_block: int,
    key_block: int,
    tiling: Tiling,
) -> dict[str, int]:
    """Compile-time constants and launch options; nothing here depends on lengths."""
    return {
        "HEAD_DIM": query.shape[-1],
        "VALUE_DIM": value.shape[-1],
        "TILE_D": padded_head_dim(query.shape[-1]),
        "TILE_V": padded_head_dim(value.shape[-1]),
        "QUERY_BLOCK": query_block,
        "KEY_BLOCK": key_block,
        "TILE_Q": tiling.query,
        "TILE_K": tiling.key,
        "STAGES": tiling.stages,
        "HAS_ORDER": order is not None,
        "HAS_MASK": key_mask is not None,
        "num_warps": tiling.warps,
        "num_stages": tiling.stages,
        "maxnreg": tiling.maxnreg,
    }


def _tiling(
    kernel: str,
    query: torch.Tensor,
    value: torch.Tensor,
    query_block: int,
    key_block: int,
    order: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    run: Callable[[Tiling], None],
) -> Tiling:
    widest = max(query.shape[-1], value.shape[-1])
    candidates = tilings(kernel, query.device, query.dtype, widest, query_block, key_block)
    identity = (query.dtype, query.shape[-1], value.shape[-1], query_block, key_block, order is None, key_mask is None)
    return choose(f"block_sparse.{kernel}", identity, candidates, run, query.device)
