"""Block-sparse attention of short sequences: one product over all pairs, of which those not selected are hidden.

Gathering blocks takes some 150 calls of torch whatever the length. Below a length they cost more than all pairs do.
"""

import math

import torch

from ..checks import accumulation_dtype
from ..layout import block_count, empty_bshd
from ..selection import Selection, are_full
from .reference import block_mask

_MOST_PAIRS = 1 << 17  # of all heads together


def attend_whole(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, selection: Selection, wants_lse: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """See `reference.block_sparse_attention`; None where gathering is quicker, or needed.

    It is needed where a row has no key, and where something is not finite: what is hidden has the weight 0 here, and
    would still make a NaN.

    Args:
        wants_lse: if not, the lse may be None.
    """
    batch, heads, tokens, _ = query.shape
    if batch * heads * tokens * tokens > _MOST_PAIRS or not query.is_cpu:
        return None
    dtype = accumulation_dtype(query.dtype)
    # see `torch.block_sparse_attention` for the dtype of values, and for what becomes of the largest weight
    value_dtype = torch.bfloat16 if value.dtype == torch.bfloat16 else dtype
    queries, keys, values = _rows(query, dtype), _rows(key, dtype), _rows(value, value_dtype)
    scores = torch.baddbmm(_hidden(selection, tokens, dtype), queries, keys.transpose(1, 2), alpha=selection.scale)
    lse = scores.amax(dim=-1) if wants_lse else None
    weights = torch.softmax(scores, dim=-1, out=scores)  # in a row without a key, or with a NaN, all are NaN
    if lse is not None:
        lse = (lse - weights.amax(dim=-1).log_()).view(batch, heads, tokens)
    attended = torch.bmm(weights if weights.dtype == value_dtype else weights.to(value_dtype), values)
    if not math.isfinite(float(attended.sum())):
        return None
    out = empty_bshd(query, batch, heads, tokens, value.shape[-1])
    return out.copy_(attended.view(batch, heads, tokens, -1)), lse


def _rows(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(B, H, S, D) -> (B * H, S, D) in this dtype."""
    return (x if x.dtype == dtype else x.to(dtype)).flatten(0, 1)


def _hidden(selection: Selection, tokens: int, dtype: torch.dtype) -> torch.Tensor:
    """(B * H, S, S): -inf where a query token must not attend to a key token, else 0."""
    lut, count, query_block, key_block, _, key_mask = selection
    batch, heads, query_blocks, slots = lut.shape
    key_blocks = block_count(tokens, key_block)
    hidden = torch.full((*lut.shape[:3], key_blocks), float("-inf"), dtype=dtype)
    if are_full(lut, count, key_blocks) or int(count.amin()) == slots:  # every list
        hidden.scatter_(-1, lut.long(), 0)
    else:
        hidden.masked_fill_(block_mask(lut, count, key_blocks), 0)
    # each block once for each of its tokens, and for those that the last one lacks
    keys = hidden[..., None].expand(-1, -1, -1, -1, min(key_block, tokens)).reshape(batch, heads, query_blocks, -1)
    if key_mask is not None:
        keys[..., :tokens].masked_fill_(~key_mask[:, None, None, :], float("-inf"))
    pairs = keys[:, :, :, None].expand(-1, -1, -1, min(query_block, tokens), -1)
    return pairs.reshape(batch * heads, -1, keys.shape[-1])[:, :tokens, :tokens]
