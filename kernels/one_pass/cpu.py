"""The plain-torch engine: those of routing and linear attention, one after the other."""

import torch

from ..linear.cpu import linear_output, linear_state
from ..routing.cpu import pool_blocks


def pool_and_summarise(
    key: torch.Tensor,
    value: torch.Tensor,
    order: torch.Tensor | None,
    block: int,
    feature_map: str,
    key_mask: torch.Tensor | None = None,
    rotated_key: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `reference.pool_and_summarise`."""
    pooled = pool_blocks(key, order, block, key_mask)
    return pooled, *linear_state(key, value, feature_map, key_mask, rotated_key)


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
    """See `reference.pool_and_read`."""
    pooled = pool_blocks(query, order, block, key_mask)
    return pooled, linear_output(query, state, key_sum, feature_map, eps, rotated_query)
