"""The definition of the tail (specification 4.6) in plain torch: slow, readable, usable in fp64."""

import torch

from ..block_sparse.reference import block_mask, token_mask
from ..checks import accumulation_dtype
from ..layout import block_count
from ..pools import Pools
from ..rows.reference import take_rows
from ..selection import Selection
from .bias import bias_of
from .runs import plain_means, valid_rows


def tail_tokens(
    lut: torch.Tensor,
    count: torch.Tensor,
    tokens: int,
    key_block: int,
    pool: int,
    begin: int,
    end: int,
    key_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """fp32 (B, H, Mq, P): how many tokens of each pool no list has, of [begin, end) and of those that are valid."""
    position = torch.arange(tokens, device=lut.device)
    seen = block_mask(lut, count, block_count(tokens, key_block))[..., position // key_block]
    left = ~seen & (position >= begin) & (position < end)
    if key_mask is not None:
        left &= key_mask[:, None, None, :]
    padded = torch.nn.functional.pad(left, (0, -tokens % pool))
    return torch.unflatten(padded, -1, (-1, pool)).sum(dim=-1).to(torch.float32)


def tail_means(
    x: torch.Tensor,
    pool: int,
    begin: int,
    end: int,
    key_mask: torch.Tensor | None = None,
    block_means: torch.Tensor | None = None,
    block: int = 0,
) -> torch.Tensor:
    """(B, H, P, D) in the dtype of x: means over the tokens of each pool that are valid and in [begin, end); 0 of none.

    block_means: what `pool_blocks` gives for blocks of `block` tokens, if it is known, from which an engine may start.
    """
    return plain_means(x, pool, valid_rows(x, begin, end, key_mask))


def take_rows_with_means(
    x: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor, pool: int, begin: int, end: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rows.reference.take_rows`, and the means over pools of the rows as they are moved."""
    rows = take_rows(x, order, inverse)
    return rows, tail_means(rows, pool, begin, end)


def attend_with_tail(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pools: Pools,
    selection: Selection,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One softmax over the selected tokens and the pools; differentiable by autograd."""
    dtype, tokens = accumulation_dtype(query.dtype), query.shape[2]
    scores = (query.to(dtype) @ key.to(dtype).transpose(-1, -2)) * selection.scale
    scores = scores.masked_fill(~token_mask(selection, tokens), float("-inf"))
    of_row = torch.arange(tokens, device=query.device) // selection.query_block
    of_pools = (query.to(dtype) @ pools.key.to(dtype).transpose(-1, -2)) * selection.scale
    bias = bias_of(pools, query.dtype)
    joint = torch.cat((scores, of_pools + bias[:, :, of_row]), dim=-1)
    lse = joint.logsumexp(dim=-1)
    empty = (joint == float("-inf")).all(dim=-1, keepdim=True)
    weights = torch.softmax(joint.masked_fill(empty, 0), dim=-1).masked_fill(empty, 0)
    values = torch.cat((value, pools.value.to(value.dtype)), dim=2).to(dtype)
    return (weights @ values).to(query.dtype), lse.detach()
