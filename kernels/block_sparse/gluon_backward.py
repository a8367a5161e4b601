"""Host side of the backward of the Gluon engine: Hopper, bf16. Reads no tensor's values."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..launch import launch
from ..layout import block_count, empty_bshd, row_strides, with_dense_rows
from ..pools import Pools
from ..selection import Selection
from .gluon_host import describe, describe_rows, multiprocessors, pack_mask
from .gluon_key_gradient import gluon_key_gradient_kernel
from .gluon_pool_gradient import gluon_pool_gradient_kernel
from .gluon_query_gradient import gluon_query_gradient_kernel
from .gluon_settings import BOX, KEY_BLOCK, key_gradient_settings, query_gradient_settings
from .gluon_stats import stats_kernel
from .inverted_index import invert


class Given(NamedTuple):
    """What the kernels of the backward read.

    Attributes:
        sources: descriptors of query, key, value and the gradient of out.
        stats: see `gluon_stats`. blocks: of 64 queries that it has for each head.
        selection: contiguous.
        tokens: S.
    """

    sources: tuple[TensorDescriptor, ...]
    stats: torch.Tensor
    blocks: int
    selection: Selection
    tokens: int

    @property
    def scales(self) -> tuple[float, float]:
        """The scale of the scores, and what makes it one in base 2."""
        return self.selection.scale, self.selection.scale * math.log2(math.e)

    @property
    def described_stats(self) -> TensorDescriptor:
        """stats, for the copy engine."""
        return describe_rows(self.stats, 2 * BOX)


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
    grad_query, grad_key, grad_value = (empty_bshd(x, *x.shape) for x in (query, key, value))
    if query.numel():
        given = prepare(grad_out, query, key, value, out, lse, selection)
        write_query_gradient(given, grad_query)
        write_key_gradients(given, grad_key, grad_value)
    return grad_query, grad_key, grad_value


def prepare(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    selection: Selection,
) -> Given:
    """Runs the kernel for what is known of every query."""
    grad_out, selection = with_dense_rows(grad_out), selection.contiguous()
    blocks = selection.lut.shape[2] * (selection.query_block // BOX)
    stats = _stats(grad_out, out, lse, blocks)
    return Given(tuple(map(describe, (query, key, value, grad_out))), stats, blocks, selection, query.shape[2])


def write_query_gradient(
    given: Given, grad_query: torch.Tensor, pools: Pools | None = None, bias: torch.Tensor | None = None
) -> torch.Tensor | None:
    """Writes grad_query, of lists and pools. Returns, with pools, fp32 (B, H, S): sums of their scores' gradients.

    bias: of the pools in base 2, see `gluon_pools.bias_of`.
    """
    batch, heads, tokens, head_dim = grad_query.shape
    lut, count, query_block, *_, key_mask = given.selection
    settings = query_gradient_settings(head_dim, query_block, masked=key_mask is not None, pooled=pools is not None)
    mask = None if key_mask is None else pack_mask(key_mask)
    pooled: tuple[TensorDescriptor | None, ...] = (None, None, None)
    sums = None
    if pools is not None and bias is not None:
        pooled = (describe(pools.key), describe(pools.value), describe_rows(bias, settings.step))
        sums = given.stats.new_empty((batch, heads, tokens))
    total = count.numel()
    grid = (min(multiprocessors(lut.device), -(-total // settings.rings)),)
    tensors = (*given.sources, describe(grad_query), *pooled, given.stats, sums, lut, count, mask)
    pool_count = 0 if pools is None else pools.key.shape[2]
    sizes = (lut.shape[2], heads, total, lut.shape[-1], tokens, pool_count, given.blocks)
    arguments = (*tensors, *sizes, *given.scales)
    launch(gluon_query_gradient_kernel, grid, lut.device, *arguments, num_warps=4, SETTINGS=settings)
    return sums


def write_key_gradients(given: Given, grad_key: torch.Tensor, grad_value: torch.Tensor) -> None:
    """Writes grad_key and grad_value."""
    batch, heads, tokens, head_dim = grad_key.shape
    lut, count, query_block, *_, key_mask = given.selection
    key_blocks = block_count(tokens, KEY_BLOCK)
    index = invert(lut, count, key_blocks)
    settings = key_gradient_settings(head_dim, query_block, masked=key_mask is not None)
    mask = None if key_mask is None else key_mask.contiguous()
    described = (*given.sources, given.described_stats, describe(grad_key), describe(grad_value))
    total, next_tile = batch * heads * key_blocks, lut.new_zeros(1)
    lists = (index.rows, index.start, longest_first(index.start), mask, next_tile)
    lengths = (total, heads, tokens, key_blocks, index.rows.shape[-1], given.blocks)
    grid = (min(multiprocessors(lut.device), -(-total // 2)),)
    arguments = (*described, *lists, *lengths, *given.scales)
    launch(gluon_key_gradient_kernel, grid, lut.device, *arguments, num_warps=4, SETTINGS=settings)


def pool_gradients(given: Given, pools: Pools, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the pooled keys and values. The sums over queries are split; parts are added in a fixed order."""
    batch, heads, count, head_dim = pools.key.shape
    query_blocks, pool_blocks = given.selection.lut.shape[2], block_count(count, KEY_BLOCK)
    each = queries_each(query_blocks, batch * heads * pool_blocks, multiprocessors(bias.device))
    splits = block_count(query_blocks, each)
    sums = [bias.new_empty((splits, batch, heads, pool_blocks * KEY_BLOCK, head_dim)) for _ in range(2)]
    query, _, _, grad = given.sources
    launch(
        gluon_pool_gradient_kernel,
        (pool_blocks * block_count(splits, 2), heads, batch),
        bias.device,
        *(
            query,
            describe(pools.key),
            describe(pools.value),
            grad,
            given.described_stats,
            describe_rows(bias, BOX),
            *sums,
        ),
        *(pool_blocks, each, query_blocks, given.blocks, *given.scales),
        num_warps=4,
        SETTINGS=key_gradient_settings(head_dim, given.selection.query_block, masked=False),
    )
    grad_key, grad_value = (x.sum(0)[:, :, :count].to(pools.key.dtype) for x in sums)
    return grad_key, grad_value


def queries_each(query_blocks: int, tiles: int, processors: int) -> int:
    """How many query blocks one of up to 16 parts has, if programs take two parts of a tile each.

    Those with which the last multiprocessor is done first; of equals the fewest parts.
    """
    eaches = [block_count(query_blocks, splits) for splits in range(1, 17)]

    def duration(each: int) -> int:
        return block_count(tiles * block_count(block_count(query_blocks, each), 2), processors) * each

    return min(eaches, key=lambda each: (duration(each), -each))


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
