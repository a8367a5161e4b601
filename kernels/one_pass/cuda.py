"""Host side of the Triton engine: what is launched. Reads no tensor's values. fp32: see `linear.cuda`."""

from __future__ import annotations

import torch

from ..capability import require_supported
from ..launch import launch
from ..layout import block_count, empty_bshd
from ..linear.host import constants, mask_bytes, new_state, reduced, split_count, strides
from . import cpu, plain
from .tiles import tiling
from .triton_keys import keys_kernel
from .triton_queries import queries_kernel


def pool_and_summarise(
    key: torch.Tensor,
    value: torch.Tensor,
    order: torch.Tensor | None,
    block: int,
    feature_map: str,
    key_mask: torch.Tensor | None = None,
    rotated_key: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `reference.pool_and_summarise`. One pass over the tokens, then the sum of the splits."""
    require_supported(key.device, key.dtype, key.shape[-1], value.shape[-1], block=block)
    if key.dtype == torch.float32:
        return cpu.pool_and_summarise(key, value, order, block, feature_map, key_mask, rotated_key)
    pooled = _new_means(key, block)
    if plain.is_plain((key, value), value.shape[-1], block, feature_map, order, key_mask, rotated_key):
        return pooled, *plain.summarise(key, value, pooled, block)
    batch, heads, tokens, _ = key.shape
    settings = tiling("keys", key, value, block, ordered=order is not None)
    splits = split_count(key, settings, block)
    state, key_sum = new_state(key, value, splits)
    launch(
        keys_kernel,
        (batch * heads, splits),
        key.device,
        *(key, value, rotated_key, _contiguous(order), mask_bytes(key_mask), pooled, state, key_sum),
        *strides(key, value, rotated_key),
        *(heads, tokens),
        **constants(key, value, feature_map, settings, rotated_key),
        BLOCK=block,
        HAS_ORDER=order is not None,
        HAS_MASK=key_mask is not None,
    )
    return pooled, *reduced(state, key_sum)


def pool_and_read(
    query: torch.Tensor,
    state: torch.Tensor,
    key_sum: torch.Tensor,
    order: torch.Tensor | None,
    block: int,
    feature_map: str,
    eps: float,
    key_mask: torch.Tensor | None = None,
    rotated_query: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.pool_and_read`. One pass over the tokens."""
    require_supported(query.device, query.dtype, query.shape[-1], state.shape[-1], block=block)
    if query.dtype == torch.float32:
        return cpu.pool_and_read(query, state, key_sum, order, block, feature_map, eps, key_mask, rotated_query)
    pooled = _new_means(query, block)
    if plain.is_plain((query,), state.shape[-1], block, feature_map, order, key_mask, rotated_query):
        return pooled, plain.read(query, state, key_sum, pooled, block, eps)
    batch, heads, tokens, _ = query.shape
    settings = tiling("queries", query, state, block, ordered=order is not None)
    out = empty_bshd(query, batch, heads, tokens, state.shape[-1])
    launch(
        queries_kernel,
        (batch * heads, split_count(query, settings, block)),
        query.device,
        *(query, rotated_query, _contiguous(order), mask_bytes(key_mask)),
        *(state.contiguous(), key_sum.contiguous(), pooled, out),
        *strides(query, rotated_query),
        *(heads, tokens, eps),
        **constants(query, state, feature_map, settings, rotated_query),
        BLOCK=block,
        HAS_ORDER=order is not None,
        HAS_MASK=key_mask is not None,
    )
    return pooled, out


def _new_means(x: torch.Tensor, block: int) -> torch.Tensor:
    batch, heads, tokens, head_dim = x.shape
    return x.new_empty((batch, heads, block_count(tokens, block), head_dim), dtype=torch.float32)


def _contiguous(order: torch.Tensor | None) -> torch.Tensor | None:
    return None if order is None else order.contiguous()
