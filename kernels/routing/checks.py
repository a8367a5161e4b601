"""What the arguments of the routing operators must satisfy."""

import torch

from .. import checks
from ..block_choice import BlockChoice
from ..checks import require
from ..layout import block_count
from .density import check_density


def check_pool_types(x: torch.Tensor, block: int, key_mask: torch.Tensor | None) -> None:
    """What can be checked without reading a size; the fake calls it as well."""
    checks.check_same_device(x=x, key_mask=key_mask)
    checks.check_float_4d(x=x)
    checks.check_block("block", block)
    checks.check_key_mask_type(key_mask)


def check_pool(x: torch.Tensor, block: int, key_mask: torch.Tensor | None) -> None:
    """Every check of `pool_blocks`."""
    check_pool_types(x, block, key_mask)
    require(x.shape[2] > 0, "x has no tokens: S must be at least 1")
    checks.check_key_mask(key_mask, x.shape[0], x.shape[2])


def check_select_types(pooled_query: torch.Tensor, pooled_key: torch.Tensor, choice: BlockChoice) -> None:
    """What can be checked without reading a size; the fake calls it as well."""
    *_, key_mask, permille = choice
    checks.check_same_device(pooled_query=pooled_query, pooled_key=pooled_key, key_mask=key_mask, permille=permille)
    checks.check_float_4d(pooled_query=pooled_query, pooled_key=pooled_key)
    require(
        pooled_query.dtype in (torch.float32, torch.float64),
        f"pooled tensors must be float32 or float64 as pool_blocks returns them, got {pooled_query.dtype}",
    )
    check_choice_types(choice)


def check_choice_types(choice: BlockChoice) -> None:
    """What of a choice can be checked without reading a size."""
    check_density(*choice[:3])
    checks.check_key_mask_type(choice.key_mask)
    checks.check_permille_type(choice.permille)


def check_sinks(sink_begin: int, sink_end: int, tokens: int) -> None:
    """Text lies within the tokens."""
    require(
        0 <= sink_begin <= sink_end <= tokens,
        f"the sink range [{sink_begin}, {sink_end}) must be ascending and lie within [0, {tokens}]",
    )


def check_select(pooled_query: torch.Tensor, pooled_key: torch.Tensor, choice: BlockChoice) -> None:
    """Every check of `select_blocks` but that of the value of `permille`."""
    check_select_types(pooled_query, pooled_key, choice)
    query_block, key_block, _, sink_begin, sink_end, key_mask, _ = choice
    (batch, heads, query_blocks, head_dim), (key_batch, key_heads, key_blocks, key_dim) = (
        pooled_query.shape,
        pooled_key.shape,
    )
    require(
        (batch, heads, head_dim) == (key_batch, key_heads, key_dim),
        f"pooled_query {tuple(pooled_query.shape)} and pooled_key {tuple(pooled_key.shape)} may differ only in blocks",
    )
    require(query_blocks > 0 and key_blocks > 0, "there must be at least one query block and one key block")
    # Both come from S tokens: each must be possible, or the forced blocks would lie outside.
    shortest, longest = (query_blocks - 1) * query_block + 1, query_blocks * query_block
    require(
        (key_blocks - 1) * key_block + 1 <= longest and key_blocks * key_block >= shortest,
        f"{query_blocks} query blocks of {query_block} and {key_blocks} key blocks of {key_block} tokens cannot cover "
        "the same sequence",
    )
    check_sinks(sink_begin, sink_end, key_blocks * key_block)
    if key_mask is not None:
        tokens = key_mask.shape[1]
        require(
            (block_count(tokens, query_block), block_count(tokens, key_block)) == (query_blocks, key_blocks),
            f"key_mask has {tokens} tokens, which do not make {query_blocks} query blocks of {query_block} and "
            f"{key_blocks} key blocks of {key_block}",
        )
        checks.check_key_mask(key_mask, batch, tokens)
