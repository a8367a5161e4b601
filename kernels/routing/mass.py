"""`salad::select_by_mass`: key blocks by the share of the softmax that the means of small cells give them."""

from __future__ import annotations

import torch

from ..autocast import without_autocast
from ..block_choice import BlockChoice
from ..checks import accumulation_dtype, check_float_4d, check_key_mask, check_permille, check_same_device, require
from ..differentiation import without_gradient
from ..direct import direct
from ..layout import block_count, empty_lists
from .checks import check_choice_types, check_sinks
from .density import list_width
from .torch import keep_best, pool_blocks

# Scores in memory at once, 128 MB: query blocks beyond that come after one another.
_SCORES_AT_ONCE = 1 << 25


@torch.library.custom_op("salad::select_by_mass", mutates_args=())
@direct("salad::select_by_mass")
@without_autocast
def select_by_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor | None,
    cell: int,
    scale: float,
    query_block: int,
    key_block: int,
    density_permille: int,
    sink_begin: int = 0,
    sink_end: int = 0,
    key_mask: torch.Tensor | None = None,
    permille: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The key blocks that hold most of each query block's softmax, estimated from means (specification 4.2; ours).

    Every cell of `cell` query tokens attends to the cells of the keys, means to means. The score of a key block is the
    sum over its cells, summed over the cells of the query block, each as often as it has tokens. Which blocks are
    forced, and what else `salad::select_blocks` says of lists, sinks, masks and ties, holds here too. Not
    differentiable.

    With a `value` the score is what a mean in the place of the block would get wrong, roughly: the mass, times the
    spread of the scores in the block (of the query block's mean), times the spread of its values.

    Args:
        query, key: (B, H, S, D), any strides; fp32, bf16, fp16 or fp64.
        value: (B, H, S, Dv), or None for the mass alone.
        cell: tokens per cell, which divide both blocks.
        scale: factor of the scores.
        query_block, key_block, density_permille, sink_begin, sink_end, key_mask, permille: see `select_blocks`.

    Returns:
        lut, count: as of `select_blocks`.

    Raises:
        KernelArgumentError: on wrong ranks, dtypes, devices, shapes, sizes, density, sinks or mask.
    """
    choice = BlockChoice(query_block, key_block, density_permille, sink_begin, sink_end, key_mask, permille)
    _check(query, key, value, cell, choice)
    tokens = key.shape[2]
    require(tokens > 0, "key has no tokens: S must be at least 1")
    check_sinks(sink_begin, sink_end, tokens)
    check_key_mask(key_mask, key.shape[0], tokens)
    check_permille(permille, density_permille)
    scores = _masses(query, key, cell, scale, choice)
    if value is not None:
        scores *= _spreads(query, key, value, choice)
    return keep_best(scores, choice)


@select_by_mass.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor | None,
    cell: int,
    scale: float,
    query_block: int,
    key_block: int,
    density_permille: int,
    sink_begin: int = 0,
    sink_end: int = 0,
    key_mask: torch.Tensor | None = None,
    permille: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    choice = BlockChoice(query_block, key_block, density_permille, sink_begin, sink_end, key_mask, permille)
    _check(query, key, value, cell, choice)
    batch, heads, tokens, _ = query.shape
    slots = list_width(block_count(tokens, key_block), *choice[:5])
    return empty_lists(query, batch, heads, block_count(tokens, query_block), slots)


without_gradient(select_by_mass)


def _check(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor | None, cell: int, choice: BlockChoice) -> None:
    """What can be checked without reading a size."""
    given = {"query": query, "key": key, **({} if value is None else {"value": value})}
    check_same_device(**given, key_mask=choice.key_mask, permille=choice.permille)
    check_float_4d(**given)
    check_choice_types(choice)
    require(
        cell > 0 and choice.query_block % cell == 0 and choice.key_block % cell == 0,
        f"cell={cell} must divide query_block={choice.query_block} and key_block={choice.key_block}",
    )


def _masses(query: torch.Tensor, key: torch.Tensor, cell: int, scale: float, choice: BlockChoice) -> torch.Tensor:
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


def _spreads(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, choice: BlockChoice) -> torch.Tensor:
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
