"""Host side of the backward of the Gluon engine: Hopper, bf16. Reads no tensor's values."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..launch import launch
from ..layout import block_count, empty_bshd, row_strides, with_dense_rows
from ..selection import Selection
from .gluon_host import describe, multiprocessors, pack_mask
from .gluon_key_gradient import gluon_key_gradient_kernel
from .gluon_query_gradient import gluon_query_gradient_kernel
from .gluon_settings import BOX, KEY_BLOCK, key_gradient_settings, query_gradient_settings
from .gluon_stats import stats_kernel
from .inverted_index import invert


def block_sparse_attention_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    selection: Selection,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the forward; only for what the engine supports.

    Three kernels beside those that invert the lists: what is known of every query, the gradient of queries over the
    lists of the query blocks, and the gradients of keys and values over the lists of the key blocks. No atomics.
    """
    batch, heads, tokens, head_dim = query.shape
    lut, count = selection.lut.contiguous(), selection.count.contiguous()
    grad_query, grad_key, grad_value = (empty_bshd(x, *x.shape) for x in (query, key, value))
    if query.numel() == 0:
        return grad_query, grad_key, grad_value
    grad_out = with_dense_rows(grad_out)
    blocks = lut.shape[2] * (selection.query_block // BOX)
    stats = _stats(grad_out, out, lse, blocks)
    scale, device, masked = selection.scale, query.device, selection.key_mask is not None
    scales = (scale, scale * math.log2(math.e))
    queries, keys, values, grads = map(describe, (query, key, value, grad_out))

    settings = query_gradient_settings(head_dim, selection.query_block, masked=masked)
    mask = None if selection.key_mask is None else pack_mask(selection.key_mask)
    total = count.numel()
    grid = (min(multiprocessors(device), -(-total // settings.rings)),)
    tensors = (queries, keys, values, grads, describe(grad_query), stats, lut, count, mask)
    sizes = (lut.shape[2], heads, total, lut.shape[-1], tokens, blocks)
    launch(gluon_query_gradient_kernel, grid, device, *tensors, *sizes, *scales, num_warps=4, SETTINGS=settings)

    key_blocks = block_count(tokens, KEY_BLOCK)
    index = invert(lut, count, key_blocks)
    key_settings = key_gradient_settings(head_dim, selection.query_block, masked=masked)
    mask = None if selection.key_mask is None else selection.key_mask.contiguous()
    rows = TensorDescriptor(stats, list(stats.shape), [128, 1], [1, 128], _stats_layout())
    described = (queries, keys, values, grads, rows, describe(grad_key), describe(grad_value))
    total, next_tile = batch * heads * key_blocks, lut.new_zeros(1)
    lists = (index.rows, index.start, longest_first(index.start), mask, next_tile)
    lengths = (total, heads, tokens, key_blocks, index.rows.shape[-1], blocks)
    grid = (min(multiprocessors(device), -(-total // 2)),)
    arguments = (*described, *lists, *lengths, *scales)
    launch(gluon_key_gradient_kernel, grid, device, *arguments, num_warps=4, SETTINGS=key_settings)
    return grad_query, grad_key, grad_value


def longest_first(start: torch.Tensor) -> torch.Tensor:
    """int32 (B * H, Mk): the key blocks of each head, longest runs first, so that no long one is left over."""
    return (start[:, 1:-1] - start[:, :-2]).argsort(dim=-1, descending=True).to(torch.int32)


def _stats(grad_out: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, blocks: int) -> torch.Tensor:
    """fp32 (B * H * blocks, 128), see `gluon_stats`."""
    batch, heads, tokens, head_dim = out.shape
    out = with_dense_rows(out)
    stats = lse.new_empty((batch * heads * blocks, 2 * BOX))
    arguments = (out, grad_out, lse.contiguous(), stats, row_strides(out), row_strides(grad_out), heads, tokens, blocks)
    launch(stats_kernel, (blocks, heads, batch), out.device, *arguments, HEAD_DIM=head_dim, num_warps=4)
    return stats


@lru_cache(maxsize=1)
def _stats_layout() -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(0, 32, 2)
