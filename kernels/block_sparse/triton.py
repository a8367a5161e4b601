"""Host side of the Triton engine of block-sparse attention: allocations, grids, launches. Reads no tensor's values."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from ..capability import arch_of, padded_head_dim
from ..launch import launch
from ..layout import block_count, describable, descriptor_strides, empty_bshd, row_strides, with_dense_rows
from ..selection import Selection
from ..tuning import choose
from .deferred import check_selection
from .inverted_index import invert
from .tiles import Tiling, tilings
from .triton_backward import key_gradient_kernel, query_gradient_kernel
from .triton_forward import forward_kernel


def block_sparse_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, selection: Selection
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.block_sparse_attention`."""
    kind, selection = _Kind.of(query, value, selection), selection.contiguous()
    lut, count, scale = selection.lut, selection.count, selection.scale
    if scale < 0:  # the kernels take the largest score before they scale it
        query, scale = -query, -scale
    batch, heads, tokens, _ = query.shape
    key_blocks = block_count(tokens, selection.key_block)
    check_selection(lut, count, key_blocks)
    out = empty_bshd(query, batch, heads, tokens, value.shape[-1])
    lse = query.new_empty((batch, heads, tokens), dtype=torch.float32)
    tensors = with_dense_rows(query), with_dense_rows(key), with_dense_rows(value)
    described = all(describable(x) for x in tensors)

    def run(tiling: Tiling) -> None:
        sources = _sources(tiling, (tiling.query, tiling.key, tiling.key), *tensors)
        launch(
            forward_kernel,
            (block_count(tokens, tiling.query), heads, batch),
            query.device,
            *(*sources, out, lse, lut, count, selection.key_mask),
            *(row_strides(x) for x in tensors),
            *(heads, tokens, lut.shape[-1], lut.shape[2], key_blocks),
            scale * math.log2(math.e),
            **kind.constants(tiling),
        )

    run(kind.choose("forward", described, run))
    return out, lse


def block_sparse_attention_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    selection: Selection,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the forward: one kernel over the lists of the query blocks, one over the lists of the key blocks."""
    kind, selection = _Kind.of(query, value, selection), selection.contiguous()
    lut, scale = selection.lut, selection.scale
    batch, heads, tokens, _ = query.shape
    query_blocks, key_blocks = lut.shape[2], block_count(tokens, selection.key_block)
    lse = lse.contiguous()
    delta, lse_log2 = torch.empty_like(lse), torch.empty_like(lse)
    grad_query, grad_key, grad_value = (empty_bshd(x, *x.shape) for x in (query, key, value))

    if not describable(grad_out):  # expanded, perhaps: the gradient of a sum
        grad_out = grad_out.contiguous()
    query, key, value, out = (with_dense_rows(x) for x in (query, key, value, out))
    tensors = (query, key, value, out, grad_out)
    described = all(describable(x) for x in tensors)

    def run_query(tiling: Tiling) -> None:
        sources = _sources(tiling, (tiling.query, tiling.key, tiling.key, tiling.query, tiling.query), *tensors)
        launch(
            query_gradient_kernel,
            (block_count(tokens, tiling.query), heads, batch),
            query.device,
            *(*sources, lse, delta, lse_log2, grad_query, lut, selection.count, selection.key_mask),
            *(row_strides(x) for x in tensors),
            *(heads, tokens, lut.shape[-1], query_blocks, key_blocks),
            *(scale, scale * math.log2(math.e)),
            **kind.constants(tiling),
        )

    run_query(kind.choose("query_gradient", described, run_query))
    index = invert(lut, selection.count, key_blocks)

    def run_key(tiling: Tiling) -> None:
        queries, grads = _sources(tiling, (tiling.query, tiling.query), query, grad_out)
        launch(
            key_gradient_kernel,
            (block_count(tokens, tiling.key), heads, batch),
            query.device,
            *(queries, key, value, grads, lse_log2, delta, grad_key, grad_value),
            *(index.rows, index.start, selection.key_mask),
            *(row_strides(x) for x in (query, key, value, grad_out)),
            *(heads, tokens, key_blocks, index.rows.shape[-1]),
            *(scale, scale * math.log2(math.e)),
            **kind.constants(tiling),
        )

    run_key(kind.choose("key_gradient", described, run_key))
    return grad_query, grad_key, grad_value


@dataclass(frozen=True)
class _Kind:
    """What selects the compiled kernel; no length is among it."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    value_dim: int
    query_block: int
    key_block: int
    masked: bool

    @classmethod
    def of(cls, query: torch.Tensor, value: torch.Tensor, selection: Selection) -> _Kind:
        blocks = (selection.query_block, selection.key_block)
        return cls(query.device, query.dtype, query.shape[-1], value.shape[-1], *blocks, selection.key_mask is not None)

    def choose(self, kernel: str, described: bool, run: Callable[[Tiling], None]) -> Tiling:
        """The default tiling, or the one that tuning found."""
        candidates, key = _candidates(self, kernel, described, arch_of(self.device))
        return choose(f"block_sparse.{kernel}", key, candidates, run, self.device)

    def constants(self, tiling: Tiling) -> dict[str, Any]:
        """Compile-time constants and launch options."""
        return {
            "HEAD_DIM": self.head_dim,
            "VALUE_DIM": self.value_dim,
            "TILE_D": padded_head_dim(self.head_dim),
            "TILE_V": padded_head_dim(self.value_dim),
            "QUERY_BLOCK": self.query_block,
            "KEY_BLOCK": self.key_block,
            "TILE_Q": tiling.query,
            "TILE_K": tiling.key,
            "STAGES": tiling.stages,
            "DESCRIPTORS": tiling.descriptors,
            "HAS_MASK": self.masked,
            "num_warps": tiling.warps,
            "num_stages": tiling.stages,
        }


# What the host does per launch counts where the device needs less than a millisecond a layer: nothing twice.
@lru_cache(maxsize=256)
def _candidates(
    kind: _Kind, kernel: str, described: bool, arch: tuple[int, int]
) -> tuple[list[Tiling], tuple[object, ...]]:
    """The tilings to choose from, and what tuning knows them by. arch: part of the key, as the gate changes it."""
    blocks, widest = (kind.query_block, kind.key_block), max(kind.head_dim, kind.value_dim)
    candidates = tilings(kernel, kind.device, kind.dtype, widest, *blocks, described=described)
    key = (kind.dtype, kind.head_dim, kind.value_dim, *blocks, kind.masked, described)
    return candidates, key


def _sources(tiling: Tiling, rows: tuple[int, ...], *tensors: torch.Tensor) -> tuple[Any, ...]:
    """What tiles of so many rows are read from: the tensors, or descriptors of them."""
    if not tiling.descriptors:
        return tensors
    described = []
    for x, tile in zip(tensors, rows, strict=True):
        box = [1, 1, tile, padded_head_dim(x.shape[-1])]
        described.append(TensorDescriptor(x, list(x.shape), descriptor_strides(x), box))
    return tuple(described)
