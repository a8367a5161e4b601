"""`salad::select_by_mass`: key blocks by the share of the softmax that the means of small cells give them."""

from __future__ import annotations

from typing import Any

import torch

from ..autocast import without_autocast
from ..block_choice import BlockChoice
from ..checks import check_float_4d, check_key_mask, check_permille, check_same_device, require
from ..differentiation import without_gradient
from ..direct import direct
from ..engines import Call, serve
from ..layout import block_count, empty_lists
from ..routing.checks import check_choice_types, check_sinks
from ..routing.density import list_width


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
        UnsupportedKernelError: the engine has no kernel for this dtype, head_dim, block or cell size or GPU.
    """
    choice = BlockChoice(query_block, key_block, density_permille, sink_begin, sink_end, key_mask, permille)
    engine, call = serve(_describe, query, key, value, cell, *choice)
    check_permille(permille, density_permille)
    selected: tuple[torch.Tensor, torch.Tensor] = engine.run(call, query, key, value, cell, scale, choice)
    return selected


def _describe(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor | None, cell: int, *given: Any) -> Call:
    choice = BlockChoice(*given)
    _check(query, key, value, cell, choice)
    batch, _, tokens, head_dim = key.shape
    require(
        key.shape == query.shape and (value is None or value.shape[:3] == key.shape[:3]),
        f"query {tuple(query.shape)} and key {tuple(key.shape)} must be alike, and a value may differ in channels only",
    )
    require(tokens > 0, "key has no tokens: S must be at least 1")
    check_sinks(choice.sink_begin, choice.sink_end, tokens)
    check_key_mask(choice.key_mask, batch, tokens)
    return Call(
        "select_by_mass",
        key.device,
        key.dtype,
        head_dim=head_dim,
        value_dim=None if value is None else value.shape[-1],
        query_block=choice.query_block,
        key_block=choice.key_block,
        cell=cell,
        masked=choice.key_mask is not None,
    )


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
