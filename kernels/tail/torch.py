"""The plain-torch engine of the tail: a few query blocks at a time, so that scores stay in cache."""

from collections.abc import Iterator
from functools import partial

import torch

from ..block_sparse.torch import block_sparse_attention, block_sparse_attention_backward
from ..checks import accumulation_dtype
from . import composed
from .counting import count_tail
from .runs import tail_means, take_rows_with_means

__all__ = ["attend_with_tail", "attend_with_tail_backward", "count_tail", "tail_means", "take_rows_with_means"]

_CHUNK_BYTES = 4 << 20  # scores of the rows worked on together


def _chunks(query: torch.Tensor, bias: torch.Tensor, query_block: int) -> Iterator[tuple[slice, torch.Tensor]]:
    """(run of rows, what is added to their scores (B, H, rows, P)) pairs that together cover the query."""
    batch, heads, tokens, _ = query.shape
    dtype = accumulation_dtype(query.dtype)
    per_block = batch * heads * query_block * bias.shape[-1] * dtype.itemsize
    step = max(1, _CHUNK_BYTES // max(1, per_block))
    for first in range(0, bias.shape[2], step):
        rows = slice(first * query_block, min((first + step) * query_block, tokens))
        spread = bias[:, :, first : first + step].repeat_interleave(query_block, dim=2)
        yield rows, spread[:, :, : rows.stop - rows.start].to(dtype)


def _reference(lse: torch.Tensor) -> torch.Tensor:
    """What is taken from scores: lse, and 0 for a row that has nothing, where -inf - -inf would be NaN."""
    return lse.masked_fill(lse == float("-inf"), 0)


def merge_tail(
    query: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    pooled_key: torch.Tensor,
    pooled_value: torch.Tensor,
    bias: torch.Tensor,
    query_block: int,
    scale: float,
) -> torch.Tensor:
    """Add the pools to the softmax whose result is `out` (B, H, S, Dv) and whose denominator is `lse` (B, H, S).

    Writes into `out`; returns the new lse.
    """
    dtype = accumulation_dtype(query.dtype)
    keys, values = pooled_key.to(dtype).transpose(-1, -2), pooled_value.to(dtype)
    joint = torch.empty_like(lse)
    for rows, added in _chunks(query, bias, query_block):
        scores = (query[:, :, rows].to(dtype) @ keys).mul_(scale).add_(added)
        joint[:, :, rows] = torch.logaddexp(lse[:, :, rows], scores.logsumexp(dim=-1))
        reference = _reference(joint[:, :, rows])
        kept = torch.exp(lse[:, :, rows] - reference)
        weights = scores.sub_(reference[..., None]).exp_()
        out[:, :, rows] = kept[..., None] * out[:, :, rows].to(dtype) + weights @ values
    return joint


def merge_tail_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    pooled_key: torch.Tensor,
    pooled_value: torch.Tensor,
    bias: torch.Tensor,
    query_block: int,
    scale: float,
    grad_query: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Adds to `grad_query`; returns the gradients of the pooled key and value and, (H,), of the log weights.

    With g the gradient of out, delta = sum(g * out) and P the weights of the pools in the joint softmax:
    dS = P * (g V^T - delta), dQ = scale dS K, dK = scale dS^T Q, dV = P^T g.

    Args:
        out, lse: joint, as `merge_tail` leaves them.
    """
    dtype = accumulation_dtype(query.dtype)
    keys, values = pooled_key.to(dtype), pooled_value.to(dtype)
    grad_key, grad_value, grad_weight = torch.zeros_like(keys), torch.zeros_like(values), keys.new_zeros(keys.shape[1])
    for rows, added in _chunks(query, bias, query_block):
        queries, grad = query[:, :, rows].to(dtype), grad_out[:, :, rows].to(dtype)
        scores = (queries @ keys.transpose(-1, -2)).mul_(scale).add_(added)
        weights = scores.sub_(_reference(lse[:, :, rows])[..., None]).exp_()
        delta = (grad * out[:, :, rows].to(dtype)).sum(dim=-1, keepdim=True)
        grad_scores = (grad @ values.transpose(-1, -2)).sub_(delta).mul_(weights)
        grad_weight += grad_scores.sum(dim=(0, 2, 3))
        grad_query[:, :, rows] += (grad_scores @ keys).mul_(scale).to(grad_query.dtype)
        grad_key += (grad_scores.transpose(-1, -2) @ queries).mul_(scale)
        grad_value += weights.transpose(-1, -2) @ grad
    return grad_key.to(pooled_key.dtype), grad_value.to(pooled_value.dtype), grad_weight


attend_with_tail = partial(composed.attend, block_sparse_attention, merge_tail)
attend_with_tail_backward = partial(composed.gradients, block_sparse_attention_backward, merge_tail_backward)
