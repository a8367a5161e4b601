"""Host side of the Triton engine of linear attention: what is launched. Reads no tensor's values.

fp32 goes to the plain-torch operators: its accumulators would not fit into registers. Their products follow
`torch.backends.cuda.matmul`, as those of any model do.
"""

from __future__ import annotations

import torch

from ..launch import launch
from ..layout import empty_bshd, mask_bytes, row_strides, with_dense_rows
from ..linear_operands import Keys, Queries
from . import torch as plain
from .absent import absent
from .host import constants, new_state, reduce_splits, split_count
from .tiles import tiling
from .triton_output import output_backward_kernel, output_kernel
from .triton_state import state_backward_kernel, state_kernel


def linear_state(keys: Keys) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.linear_state`. One pass over the tokens, then the sum of the splits."""
    key, value, feature_map, key_mask, rotated_key = keys
    if key.dtype == torch.float32:
        return plain.linear_state(keys)
    key, value, rotated_key = with_dense_rows(key), with_dense_rows(value), _dense(rotated_key)
    batch, heads, tokens, _ = key.shape
    settings = tiling("state", key, value)
    splits = split_count(key, settings)
    state, key_sum = new_state(key, value, splits)
    launch(
        state_kernel,
        (batch * heads, splits),
        key.device,
        *(key, value, rotated_key, mask_bytes(key_mask), state, key_sum),
        *(row_strides(x) for x in (key, value, rotated_key)),
        *(heads, tokens),
        **constants(key, value, feature_map, settings, rotated_key),
        HAS_MASK=key_mask is not None,
    )
    return reduce_splits(state, key_sum)


def linear_state_backward(
    grad_state: torch.Tensor, grad_key_sum: torch.Tensor, keys: Keys
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `torch.linear_state_backward`. One pass over the tokens."""
    key, value, feature_map, key_mask, rotated_key = keys
    if key.dtype == torch.float32:
        return plain.linear_state_backward(grad_state, grad_key_sum, keys)
    key, value, rotated_key = with_dense_rows(key), with_dense_rows(value), _dense(rotated_key)
    batch, heads, tokens, _ = key.shape
    settings = tiling("state_backward", key, value)
    grad_key, grad_value = empty_bshd(key, *key.shape), empty_bshd(value, *value.shape)
    grad_rotated = None if rotated_key is None else empty_bshd(key, *key.shape)
    launch(
        state_backward_kernel,
        (batch * heads, split_count(key, settings)),
        key.device,
        *(grad_state.contiguous(), grad_key_sum.contiguous(), key, value, rotated_key, mask_bytes(key_mask)),
        *(grad_key, grad_value, grad_rotated),
        *(row_strides(x) for x in (key, value, rotated_key)),
        *(heads, tokens),
        **constants(key, value, feature_map, settings, rotated_key),
        HAS_MASK=key_mask is not None,
    )
    return grad_key, grad_value, absent(key) if grad_rotated is None else grad_rotated


def linear_output(queries: Queries) -> torch.Tensor:
    """See `reference.linear_output`. One pass over the tokens."""
    query, state, key_sum, feature_map, eps, rotated_query = queries
    if query.dtype == torch.float32:
        return plain.linear_output(queries)
    query, rotated_query = with_dense_rows(query), _dense(rotated_query)
    batch, heads, tokens, _ = query.shape
    settings = tiling("output", query, state)
    out = empty_bshd(query, batch, heads, tokens, state.shape[-1])
    launch(
        output_kernel,
        (batch * heads, split_count(query, settings)),
        query.device,
        *(query, rotated_query, state.contiguous(), key_sum.contiguous(), out),
        *(row_strides(x) for x in (query, rotated_query)),
        *(heads, tokens, eps),
        **constants(query, state, feature_map, settings, rotated_query),
    )
    return out


def linear_output_backward(
    grad_out: torch.Tensor, queries: Queries
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `torch.linear_output_backward`. One pass over the tokens, then the sum of the splits."""
    query, state, key_sum, feature_map, eps, rotated_query = queries
    if query.dtype == torch.float32:
        return plain.linear_output_backward(grad_out, queries)
    grad_out, query, rotated_query = with_dense_rows(grad_out), with_dense_rows(query), _dense(rotated_query)
    batch, heads, tokens, _ = query.shape
    settings = tiling("output_backward", query, state)
    splits = split_count(query, settings)
    grad_query = empty_bshd(query, *query.shape)
    grad_rotated = None if rotated_query is None else empty_bshd(query, *query.shape)
    grad_state, grad_key_sum = new_state(query, state, splits)
    launch(
        output_backward_kernel,
        (batch * heads, splits),
        query.device,
        *(grad_out, query, rotated_query, state.contiguous(), key_sum.contiguous()),
        *(grad_query, grad_rotated, grad_state, grad_key_sum),
        *(row_strides(x) for x in (grad_out, query, rotated_query)),
        *(heads, tokens, eps),
        **constants(query, state, feature_map, settings, rotated_query),
    )
    sums = reduce_splits(grad_state, grad_key_sum)
    return grad_query, *sums, absent(query) if grad_rotated is None else grad_rotated


def _dense(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else with_dense_rows(x)
