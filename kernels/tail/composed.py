"""The tail after sparse attention: its result and its lse are the state that a softmax over the pools goes on from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..selection import Selection
from .bias import bias_of

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def attend(
    attention: Callable[..., Any],
    merge: Callable[..., torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pooled_key: torch.Tensor,
    pooled_value: torch.Tensor,
    pool_tokens: torch.Tensor,
    log_weight: torch.Tensor | None,
    selection: Selection,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.attend_with_tail`; with an engine's sparse attention, and its `merge` over the pools."""
    out, lse = attention(query, key, value, selection)
    bias = bias_of(pool_tokens, log_weight, query.dtype)
    return out, merge(query, out, lse, pooled_key, pooled_value, bias, selection.query_block, selection.scale)


def gradients(
    attention: Callable[..., Any],
    merge: Callable[..., Any],
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
    """Of query, key, value, pooled key and value, and, fp32 (H,), of the log weights.

    With the result and the lse of all columns, the backward of sparse attention gives what its columns have in the
    joint softmax.

    Args:
        attention, merge: the engine's backward functions.
        out, lse: of all columns.
    """
    grad_query, grad_key, grad_value = attention(grad_out, query, key, value, out, lse, selection)
    bias = bias_of(pool_tokens, log_weight, query.dtype)
    pools = (pooled_key, pooled_value, bias, selection.query_block, selection.scale)
    return (grad_query, grad_key, grad_value, *merge(grad_out, query, out, lse, *pools, grad_query))
