"""Host side of the Gluon engine of the tail: the pools are further steps of the kernels of sparse attention."""

from __future__ import annotations

import torch

from ..block_sparse import gluon
from ..block_sparse.gluon_backward import pool_gradients, prepare, write_key_gradients, write_query_gradient
from ..block_sparse.gluon_pools import bias_of
from ..layout import empty_bshd
from ..pools import Pools
from ..selection import Selection
from .composed import Gradients


def attend_with_tail(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pools: Pools,
    selection: Selection,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.attend_with_tail`."""
    return gluon.attend(query, key, value, selection, pools)


def attend_with_tail_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    pools: Pools,
    selection: Selection,
) -> Gradients:
    """See `composed.gradients`. The gradient of queries is one walk over lists and pools."""
    grad_query, grad_key, grad_value = (empty_bshd(x, *x.shape) for x in (query, key, value))
    if query.numel() == 0:
        zeros = (torch.zeros_like(pools.key), torch.zeros_like(pools.value))
        return grad_query, grad_key, grad_value, *zeros, lse.new_zeros(lse.shape[1])
    given, bias = prepare(grad_out, query, key, value, out, lse, selection), bias_of(pools, 1.0)
    sums = write_query_gradient(given, grad_query, pools, bias)
    assert sums is not None
    write_key_gradients(given, grad_key, grad_value)
    return grad_query, grad_key, grad_value, *pool_gradients(given, pools, bias), sums.sum(dim=(0, 2))
