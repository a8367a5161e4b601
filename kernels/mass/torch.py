"""The plain-torch engine of `select_by_mass`. Runs on any device: all scores between cells pass through memory."""

import torch

from ..block_choice import BlockChoice
from ..checks import accumulation_dtype
from ..layout import block_count
from ..routing.torch import keep_best, pool_blocks

# Scores in memory at once, 128 MB: query blocks beyond that come after one another.
_SCORES_AT_ONCE = 1 << 25


def select_by_mass(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor | None, cell: int, scale: float, choice: BlockChoice
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `api.select_by_mass`."""
    scores = masses_of(query, key, cell, scale, choice)
    if value is not None:
        scores *= spreads_of(query, key, value, choice)
    return keep_best(scores, choice)


def masses_of(query: torch.Tensor, key: torch.Tensor, cell: int, scale: float, choice: BlockChoice) -> torch.Tensor:
    """(B, H, Mq, Mk): the share of each key block in the softmax over cells, times the tokens of the query block."""
    tokens, mask = key.shape[2], choice.key_mask
    query_blocks, key_blocks = (block_count(tokens, block) for block in (choice.query_block, choice.key_block))
    of_query, of_key = choice.query_block // cell, choice.key_block // cell
    queries, keys = (pool_blocks(x, cell, mask) for x in (query, key))  # in plain torch: no kernel has such blocks
    valid = torch.ones((1, tokens), dtype=torch.bool, device=key.device) if mask is None else mask
    valid = torch.nn.functional.pad(valid, (0, -tokens % cell))
    held = torch.unflatten(valid, 1, (-1, cell)).sum(2).to(accumulation_dtype(query.dtype))  # tokens of each cell
    weights = _filled(held[:, None, :, None], query_blocks * of_query)
    queries = _filled(queries, query_blocks * of_query).mul(scale).flatten(0, 1)
    keys = _filled(keys, key_blocks * of_key).mT.flatten(0, 1)
    added = _filled(held[:, None, :, None], key_blocks * of_key).mT.log()  # -inf where a cell holds nothing
    batch, heads = query.shape[:2]
    added = added.expand(batch, heads, 1, -1).flatten(0, 1)
    found = queries.new_empty((batch, heads, query_blocks, key_blocks))
    step = max(1, _SCORES_AT_ONCE // max(1, batch * heads * of_query * key_blocks * of_key))
    for first in range(0, query_blocks, step):
        rows = slice(first * of_query, (first + step) * of_query)
        shares = torch.softmax(torch.baddbmm(added, queries[:, rows], keys), dim=-1)
        shares = torch.unflatten(shares, 2, (key_blocks, of_key)).sum(3).view(batch, heads, -1, key_blocks)
        shares.mul_(weights[:, :, rows])
        found[:, :, first : first + step] = torch.unflatten(shares, 2, (-1, of_query)).sum(3)
    return found


def spreads_of(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, choice: BlockChoice) -> torch.Tensor:
    """(B, H, Mq, Mk): the spread of a block's scores, of the mean query and unscaled, times that of its values."""
    mask, block = choice.key_mask, choice.key_block
    queries = pool_blocks(query, choice.query_block, mask)
    of_scores = queries.square() @ _variance(key, block, mask).mT
    return of_scores.mul_(_variance(value, block, mask).sum(3)[:, :, None]).sqrt_()


def _variance(x: torch.Tensor, block: int, key_mask: torch.Tensor | None) -> torch.Tensor:
    """(B, H, ceil(S / block), D): of the valid rows of each block, channel by channel."""
    wide = x.to(accumulation_dtype(x.dtype))
    mean = pool_blocks(wide, block, key_mask)
    return pool_blocks(wide.square(), block, key_mask).sub_(mean.square()).clamp_(min=0)


def _filled(x: torch.Tensor, length: int) -> torch.Tensor:
    """x with zeros behind its third axis, up to a length."""
    return torch.nn.functional.pad(x, (0, 0, 0, length - x.shape[2]))
