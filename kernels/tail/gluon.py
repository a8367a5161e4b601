"""Host side of the Gluon engine of the tail: the pools are further steps of the kernels of sparse attention."""

from __future__ import annotations

import torch

from ..block_sparse import gluon
from ..block_sparse.gluon_backward import pool_gradients, prepare, write_key_gradients, write_query_gradient
from ..block_sparse.gluon_pools import Pools, bias_of
from ..layout import empty_bshd
from ..selection import Selection
from .composed import Gradients


def attend_with_tail(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pooled_key: torch.Tensor,
    pooled_value: torch.Tensor,
    pool_tokens: torch.Tensor,
    log_weight: torch.Tensor | None,
    selection: Selection,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.attend_with_tail`."""
    return gluon.attend(query, key, value, selection, Pools(pooled_key, pooled_value, pool_tokens, log_weight))


def attend_with_tail_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    pooled_key: torch.Tensor,
    pooled_value: torch.Tensor,
    pool_tokens: torch.Tensor,
    log_weight: torch.Tensor | None,
    selection: Selection,
) -> Gradients:
    """See `composed.gradients`. The gradient of queries is one walk over lists and pools."""
    pools = Pools(pooled_key, pooled_value, pool_tokens, log_weight)
    grad_query, grad_key, grad_value = (empty_bshd(x, *x.shape) for x in (query, key, value))
    if query.numel() == 0:
        zeros = (pooled_key.new_zeros(pooled_key.shape), pooled_value.new_zeros(pooled_value.shape))
        return grad_query, grad_key, grad_value, *zeros, lse.new_zeros(lse.shape[1])
    given, bias = prepare(grad_out, query, key, value, out, lse, selection), bias_of(pools, 1.0)
    sums = write_query_gradient(given, grad_query, pools, bias)
    assert sums is not None
    write_key_gradients(given, grad_key, grad_value)
    return grad_query, grad_key, grad_value, *pool_gradients(given, pools, bias), sums.sum(dim=(0, 2))
