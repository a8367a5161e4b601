"""The definition: what routing and linear attention define, side by side."""

import torch

from ..linear.reference import linear_output, linear_state
from ..routing.reference import pool_blocks


def pool_and_summarise(
    key: torch.Tensor,
    value: torch.Tensor,
    order: torch.Tensor | None,
    block: int,
    feature_map: str,
    key_mask: torch.Tensor | None = None,
    rotated_key: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The means of the key's blocks, which have no gradient, and the two sums of linear attention."""
    pooled = pool_blocks(key.detach(), order, block, key_mask)
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
    """The means of the query's blocks, which have no gradient, and the output of linear attention."""
    pooled = pool_blocks(query.detach(), order, block, key_mask)
    return pooled, linear_output(query, state, key_sum, feature_map, eps, rotated_query)
