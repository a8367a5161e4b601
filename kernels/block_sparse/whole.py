"""Block-sparse attention of short sequences: one product over all pairs, of which those not selected are hidden.

Gathering blocks takes some 150 calls of torch whatever the length. Below a length they cost more than all pairs do.
"""

import functools
import math

import torch

from ..checks import accumulation_dtype
from ..layout import block_count, empty_bshd
from ..selection import Selection
from .reference import block_mask

_MOST_PAIRS = 1 << 17  # of all heads together


def attend_whole(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, selection: Selection
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """See `reference.block_sparse_attention`; None where gathering is quicker, or needed.

    It is needed where a row has no key, and where something is not finite: what is hidden has the weight 0 here, and
    would still make a NaN.
    """
    batch, heads, tokens, _ = query.shape
    if batch * heads * tokens * tokens > _MOST_PAIRS or not query.is_cpu or not math.isfinite(float(value.sum())):
        return None
    dtype, rows = accumulation_dtype(query.dtype), batch * heads
    # see `torch.block_sparse_attention` for the dtype of values, and for what becomes of the largest weight
    value_dtype = torch.bfloat16 if value.dtype == torch.bfloat16 else dtype
    queries, keys = (x.to(dtype).reshape(rows, tokens, -1) for x in (query, key))
    hidden = _hidden(selection, tokens, dtype).view(rows, tokens, tokens)
    scores = torch.baddbmm(hidden, queries, keys.transpose(1, 2), alpha=selection.scale, out=hidden)
    lse = scores.amax(dim=-1)
    if not math.isfinite(float(lse.sum())):
        return None
    weights = torch.softmax(scores, dim=-1, out=scores)
    lse -= weights.amax(dim=-1).log_()
    values = value.to(value_dtype).reshape(rows, tokens, -1)
    out = empty_bshd(query, batch, heads, tokens, value.shape[-1])
    out.copy_(torch.bmm(weights.to(value_dtype), values).view(batch, heads, tokens, -1))
    return out, lse.view(batch, heads, tokens)


def _hidden(selection: Selection, tokens: int, dtype: torch.dtype) -> torch.Tensor:
    """(B, H, S, S): -inf where a query token must not attend to a key token, else 0."""
    lut, count, query_block, key_block, _, key_mask = selection
    key_blocks = block_count(tokens, key_block)
    hidden = torch.full((*lut.shape[:3], key_blocks), float("-inf"), dtype=dtype)
    if int(count.amin()) == lut.shape[-1]:  # every list is full
        hidden.scatter_(-1, lut.long(), 0)
    else:
        hidden.masked_fill_(block_mask(lut, count, key_blocks), 0)
    hidden = hidden.index_select(3, _block_of(tokens, key_block))
    if key_mask is not None:
        hidden.masked_fill_(~key_mask[:, None, None, :], float("-inf"))
    return hidden.index_select(2, _block_of(tokens, query_block))


@functools.lru_cache(maxsize=64)
def _block_of(tokens: int, block: int) -> torch.Tensor:
    """int64 (S,): the block of each token."""
    return torch.arange(tokens) // block
