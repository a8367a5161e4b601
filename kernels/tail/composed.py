"""The tail after sparse attention: its result and its lse are the state that a softmax over the pools goes on from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..pools import Pools
from ..selection import Selection
from .bias import bias_of

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def attend(
    attention: Callable[..., Any],
    merge: Callable[..., torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pools: Pools,
    selection: Selection,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.attend_with_tail`; with an engine's sparse attention, and its `merge` over the pools."""
    out, lse = attention(query, key, value, selection)
    settings = (pools.key, pools.value, bias_of(pools, query.dtype), selection.query_block, selection.scale)
    return out, merge(query, out, lse, *settings)


def gradients(
    attention: Callable[..., Any],
    merge: Callable[..., Any],
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    pools: Pools,
    selection: Selection,
) -> Gradients:
    """Of query, key, value, pooled key and value, and, fp32 (H,), of the log weights.

    With the result and the lse of all columns, the backward of sparse attention gives what its columns have in the
    joint softmax.

    Args:
        attention, merge: the engine's backward functions.
        out, lse: of all columns.
    """
    grad_query, grad_key, grad_value = attention(grad_out, query, key, value, out, lse, selection)
    settings = (pools.key, pools.value, bias_of(pools, query.dtype), selection.query_block, selection.scale)
    return (grad_query, grad_key, grad_value, *merge(grad_out, query, out, lse, *settings, grad_query))
