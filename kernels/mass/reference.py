"""The scores of `select_by_mass` (specification 4.2) in plain torch: slow, readable, usable in fp64."""

import torch

from ..block_choice import BlockChoice
from ..layout import block_count
from ..routing.reference import pool_blocks


def scores_of(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor | None,
    cell: int,
    scale: float,
    choice: BlockChoice,
) -> torch.Tensor:
    """(B, H, Mq, Mk): of each query block, the mass of each key block; with a value, times what a mean of it hides."""
    mask = choice.key_mask
    if mask is None:
        mask = torch.ones(query.shape[0], query.shape[2], dtype=torch.bool, device=query.device)
    held = pool_blocks(mask[:, None, :, None].to(torch.float64), 1).squeeze(-1)
    held = torch.stack([run.sum(2) for run in torch.split(held, cell, dim=2)], dim=2)  # (B, 1, cells)
    scores = scale * pool_blocks(query, cell, mask) @ pool_blocks(key, cell, mask).mT
    shares = torch.softmax(scores + held.log()[:, :, None, :], dim=-1) * held[..., None]
    found = _sums(_sums(shares, choice.query_block // cell, 2), choice.key_block // cell, 3)
    if value is None:
        return found
    queries = pool_blocks(query, choice.query_block, mask)
    of_keys, of_values = (_variance(x, choice.key_block, mask) for x in (key, value))
    return found * (queries.square() @ of_keys.mT * of_values.sum(3)[:, :, None]).sqrt()


def _sums(x: torch.Tensor, size: int, axis: int) -> torch.Tensor:
    return torch.stack([run.sum(axis) for run in torch.split(x, size, dim=axis)], dim=axis)


def _variance(x: torch.Tensor, block: int, mask: torch.Tensor) -> torch.Tensor:
    """(B, H, M, D): of the valid rows of each block, channel by channel."""
    means = pool_blocks(x, block, mask)
    rows = torch.arange(x.shape[2], device=x.device) // block
    assert means.shape[2] == block_count(x.shape[2], block)
    return pool_blocks((x - means[:, :, rows]).square(), block, mask)
