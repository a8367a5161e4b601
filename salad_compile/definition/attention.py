"""The definition of SALAD attention (arXiv 2601.16515), once, for tensors and for `fx.Proxy` objects alike.

Nothing here branches on shapes or on values, so that the same lines run eagerly and splice themselves into a graph.
The heavy parts are operators of `salad_compile.kernels`; everything else is plain ATen, which Inductor fuses.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from salad_compile import kernels as _kernels
from salad_compile.config import AttentionSpec
from salad_compile.definition.branch_tensors import BranchTensors
from salad_compile.definition.token_layout import Reordering, Segments, reordering, reordering_in_place, segments
from salad_compile.errors import SiteLostError
from salad_compile.kernels.exchange import api as _head_exchange  # these two register torch.ops.salad.*

__all__ = [
    "BranchTensors",
    "Mapped",
    "Operands",
    "linear_attention",
    "operands_of",
    "salad_attention",
    "salad_of",
    "sparse_attention",
    "update_of",
    "window_attention",
]

# Added to the normaliser of the linear branch, in fp32 (specification 5, our choice).
LINEAR_EPS = 1e-6

assert _kernels  # imported for their effect
assert _head_exchange


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    where: Segments,
    spec: AttentionSpec,
    scale: float,
    key_mask: Tensor | None = None,
    permille: Tensor | None = None,
) -> Tensor:
    """Top-K routed block-sparse softmax attention (specification 4.2).

    Args:
        query, key, value: (B, H, S, head_dim), any strides, one floating dtype.
        where: video and text, see :func:`segments`.
        spec: block sizes and density.
        scale: factor of the scores, as in the attention call that is replaced.
        key_mask: bool (B, S), True where a key is valid, or None.
        permille: int32 (), how many blocks are kept per thousand; at most spec.permille, which None stands for.

    Returns:
        (B, H, S, value head_dim) in the dtype of query. No gradient flows through the selection.
    """
    pooled_query = torch.ops.salad.pool_blocks.default(query.detach(), spec.query_block, key_mask)
    pooled_key = torch.ops.salad.pool_blocks.default(key.detach(), spec.key_block, key_mask)
    blocks, sinks = (spec.query_block, spec.key_block), (where.sink_begin, where.sink_end)
    selected = torch.ops.salad.select_blocks.default(
        pooled_query, pooled_key, *blocks, spec.permille, *sinks, key_mask, permille
    )
    attended = torch.ops.salad.block_sparse_attention.default(
        query, key, value, selected[0], selected[1], *blocks, scale, key_mask
    )
    out: Tensor = attended[0]
    return out


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    temporal_heads: Tensor,
    order: Reordering,
    where: Segments,
    spec: AttentionSpec,
    scale: float,
    permille: Tensor | None = None,
) -> Tensor:
    """ST-SWA: each head attends within a sliding window, in space or through time (specification 4.3).

    Args:
        query, key, value, where, spec, scale, permille: see :func:`sparse_attention`; tokens in the native order.
        temporal_heads: bool (H,), the heads whose window runs over the tokens in `order`; the others' over the native.
        order: all frames of a place one after another, text where it is.

    Returns:
        (B, H, S, value head_dim) in the dtype of query and in the native order.
    """
    chosen = temporal_heads[:, None, None]
    query, key, value = (
        torch.where(chosen, torch.ops.salad.take_rows.default(t, *order), t) for t in (query, key, value)
    )
    blocks = (spec.query_block, spec.key_block)
    selected = torch.ops.salad.window_blocks.default(query, *blocks, spec.permille, spec.window, *where, permille)
    attended = torch.ops.salad.block_sparse_attention.default(
        query, key, value, selected[0], selected[1], *blocks, scale, None
    )
    back = torch.ops.salad.take_rows.default(attended[0], order.inverse, order.order)
    return torch.where(chosen, back, attended[0])


class Mapped(NamedTuple):
    """What the map-then-rotate placement takes (specification 5), shaped like the operands of the call.

    Attributes:
        query, key: before the position encoding.
        rotated_query, rotated_key: the model's position encoding of their features, R phi(q') and R phi(k').
    """

    query: Tensor
    key: Tensor
    rotated_query: Tensor
    rotated_key: Tensor


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spec: AttentionSpec,
    key_mask: Tensor | None = None,
    mapped: Mapped | None = None,
) -> Tensor:
    """Bidirectional linear attention over all tokens (specification 5).

    Args:
        query, key, value: (B, H, S, head_dim) as they reach softmax attention, after the position encoding.
        key_mask: bool (B, S), True where a key is valid, or None.
        mapped: for map-then-rotate; then query and key are not read.

    With `spec.group` the tokens are those of this process, and the sums run over all processes.

    Returns:
        (B, H, S, value head_dim): phi(q) KV / (phi(q) z + eps), in the dtype of query.
    """
    rotated_query = rotated_key = None
    if mapped is not None:
        query, key, rotated_query, rotated_key = mapped
    state = torch.ops.salad.linear_state.default(key, value, spec.feature_map, key_mask, rotated_key)
    if spec.group:
        state = [torch.ops.salad.sum_of_processes.default(state[i], spec.group) for i in range(2)]
    out: Tensor = torch.ops.salad.linear_output.default(
        query, state[0], state[1], spec.feature_map, LINEAR_EPS, rotated_query
    )
    return out


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight.to(x.dtype), bias.to(x.dtype))


def _gate(gate_input: Tensor, branch: BranchTensors, spec: AttentionSpec, dtype: torch.dtype) -> Tensor:
    """sigmoid(x w_g + b_g), (B, rows, 1), or (B, rows, H) with one gate per head (specification 2)."""
    assert branch.gate_weight is not None
    assert branch.gate_bias is not None
    logits = torch.matmul(gate_input, branch.gate_weight.to(gate_input.dtype))
    logits = logits.unsqueeze(-1) if spec.gate == "token" else logits
    logits = logits + branch.gate_bias.to(gate_input.dtype)
    # the sigmoid is taken in fp32 (specification 1)
    return torch.sigmoid(logits.to(torch.promote_types(dtype, torch.float32))).to(dtype)


def with_all_heads(tensor: Tensor, groups: int) -> Tensor:
    """(B, H / groups, S, D) -> (B, H, S, D): each key or value head once for each query head that shares it."""
    return tensor if groups == 1 else tensor.repeat_interleave(groups, dim=1)


def salad_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate_input: Tensor,
    branch: BranchTensors,
    order: Tensor | None,
    spec: AttentionSpec,
    *,
    scale: float,
    dtype: torch.dtype,
    key_mask: Tensor | None = None,
    text: Tensor | None = None,
    mapped: Mapped | None = None,
) -> Tensor:
    """O' = O_sparse + s_layer sigmoid(x w_g + b_g) Proj(s_head O_linear), before the output projection.

    Specification 2 (v1: both scales are 1) and 3 (our reading of v2).

    Of a joint sequence the rows of the video get all of this. Text rows are dense and have no linear branch: the branch
    makes up for what sparsity leaves out, and they leave out nothing (specification 4.4).

    Args:
        query: (B, H, S, head_dim), exactly what reaches softmax attention. With `spec.text` "prefix": the video's
            rows only.
        key, value: (B, H / spec.groups, S, head_dim).
        gate_input: x, the input of the query projection, (B, V, C), (B * V, C), or (V, C) when B is 1. V counts the
            video's tokens; with `spec.single` x holds the text as well, S tokens.
        branch: gate and projection of the site.
        order: int32 (2, V), the order of the video's tokens and its inverse; None is the native order. With the pattern
            "stswa" it is :func:`salad_compile.grid.orders.temporal_order`, and never None.
        spec, scale: see :func:`sparse_attention`.
        dtype: dtype of the attention result that is replaced. Inside autocast query, key and value may differ from it,
            and operators of torch.library are not autocast.
        key_mask: bool (B, S), True where a key is valid, or None; not with "stswa".
        text: with `spec.single`, and where there is no order: (B, S - V, any), whose length counts the text.
        mapped: with `spec.rope_placement` "map-then-rotate". None: there is no position encoding between projection and
            call, so that the two placements are one.

    Returns:
        (B, H, S, value head_dim) in `dtype`; with "prefix" the video's rows only.
    """
    given = operands_of(query, key, value, gate_input, branch, order, spec, dtype, key_mask, text, mapped)
    return salad_of(given, spec, scale)


class Operands(NamedTuple):
    """Tensors of one call with one dtype, all heads and, with "prefix", a row of zeros for each query of the text.

    gate: (B, V, 1 or H) for the video's rows, or None. side: where the text lies, never "prefix". video: V, how many
    tokens are video. The others: :func:`salad_attention`.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    gate: Tensor | None
    branch: BranchTensors
    order: Tensor | None
    key_mask: Tensor | None
    mapped: Mapped | None
    side: str
    video: int


def operands_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate_input: Tensor,
    branch: BranchTensors,
    order: Tensor | None,
    spec: AttentionSpec,
    dtype: torch.dtype,
    key_mask: Tensor | None,
    text: Tensor | None,
    mapped: Mapped | None,
) -> Operands:
    """What :func:`salad_attention` computes with, of its arguments."""
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    mapped = mapped if spec.linear_branch else None
    key, value = with_all_heads(key, spec.groups), with_all_heads(value, spec.groups)
    tokens, prefix = key.shape[2], spec.text == "prefix"
    gate_input = gate_input.reshape(query.shape[0], -1, gate_input.shape[-1])
    video = _video_tokens(order, text, tokens) if spec.single else gate_input.shape[1]
    if prefix:  # queries that nobody asked for, so that queries and keys are the same tokens
        query = F.pad(query, (0, 0, tokens - video, 0))
    side = "before" if prefix else spec.text
    gate = None
    if spec.linear_branch and spec.gate != "none":
        gate = _gate(gate_input, branch, spec, dtype)
        if spec.single:  # the video's rows of what the stream holds
            where = segments(side, tokens, video)
            gate = gate[:, where.video_begin : where.video_end]
    if mapped is not None:
        mapped = _like_operands(mapped, spec, dtype, tokens - video if prefix else 0)
    return Operands(query, key, value, gate, branch, order, key_mask, mapped, side, video)


def _like_operands(mapped: Mapped, spec: AttentionSpec, dtype: torch.dtype, padding: int) -> Mapped:
    """With the dtype, the heads and the padding that query and key have got."""
    query, key, rotated_query, rotated_key = (tensor.to(dtype) for tensor in mapped)
    key, rotated_key = with_all_heads(key, spec.groups), with_all_heads(rotated_key, spec.groups)
    if spec.text == "prefix":
        query, rotated_query = F.pad(query, (0, 0, padding, 0)), F.pad(rotated_query, (0, 0, padding, 0))
    return Mapped(query, key, rotated_query, rotated_key)


def salad_of(given: Operands, spec: AttentionSpec, scale: float) -> Tensor:
    """:func:`salad_attention` of its operands."""
    if spec.group:
        return _across_processes(given, spec, scale)
    out = (_windows if spec.pattern == "stswa" else _routed)(given, spec, scale)
    return out[:, :, given.key.shape[2] - given.video :] if spec.text == "prefix" else out


def _routed(given: Operands, spec: AttentionSpec, scale: float) -> Tensor:
    """The sum with routed blocks; the tokens are moved into the order of the blocks and back."""
    query, key, value, gate, branch, order, key_mask, mapped, side, video = given
    tokens = key.shape[2]
    if spec.token_order == "flat" or order is None:
        moved, where = None, segments(side, tokens, video)
    else:
        moved, where = reordering(order, side, tokens), segments("none" if side == "none" else "after", tokens, video)
        query, key, value = (torch.ops.salad.take_rows.default(t, *moved) for t in (query, key, value))
        key_mask = None if key_mask is None else key_mask.index_select(1, moved.order)
        gate = None if gate is None else gate.index_select(1, order[0])
    out = sparse_attention(query, key, value, where, spec, scale, key_mask, branch.permille)
    if spec.linear_branch and mapped is None:  # of the rows as they were moved, which are in memory anyway
        linear = linear_attention(query, key, value, spec, key_mask)
        out = out + _update(linear, gate, branch, side, where, tokens).to(out.dtype)
    out = out if moved is None else torch.ops.salad.take_rows.default(out, moved.inverse, moved.order)
    return out if mapped is None else out + update_of(given, spec).to(out.dtype)


def _across_processes(given: Operands, spec: AttentionSpec, scale: float) -> Tensor:
    """The sum with routed blocks, of this process's tokens.

    Sparse attention gets all tokens of a part of the heads. Gate and projection belong to tokens, and of the linear
    branch the processes need to know only their sums over tokens: it stays where its tokens are.
    """
    if given.key_mask is not None:
        raise SiteLostError("attention masks and tokens that are split over processes do not go together.")
    tensors = (given.query, given.key, given.value)
    query, key, value = (torch.ops.salad.gather_tokens.default(t, spec.group) for t in tensors)
    tokens, moved = key.shape[2], None
    if spec.token_order != "flat" and given.order is not None:
        moved = reordering(given.order, "none", tokens)
        query, key, value = (torch.ops.salad.take_rows.default(t, *moved) for t in (query, key, value))
    where = segments("none", tokens, tokens)
    out: Tensor = sparse_attention(query, key, value, where, spec, scale, None, given.branch.permille)
    out = out if moved is None else torch.ops.salad.take_rows.default(out, moved.inverse, moved.order)
    out = torch.ops.salad.gather_heads.default(out, spec.group)
    return out + update_of(given, spec).to(out.dtype) if spec.linear_branch else out


def _windows(given: Operands, spec: AttentionSpec, scale: float) -> Tensor:
    """The sum with sliding windows."""
    query, key, value, _, branch, order, key_mask, _, side, video = given
    assert order is not None
    assert key_mask is None
    assert branch.temporal_heads is not None
    tokens = key.shape[2]
    where = segments(side, tokens, video)
    through_time = reordering_in_place(order, side, tokens)
    out = window_attention(query, key, value, branch.temporal_heads, through_time, where, spec, scale, branch.permille)
    return out + update_of(given, spec).to(out.dtype) if spec.linear_branch else out


def update_of(given: Operands, spec: AttentionSpec) -> Tensor:
    """What the linear branch adds, (B, H, S, value head_dim), in the native order: its sums do not depend on one."""
    tokens, side, video = given.key.shape[2], given.side, given.video
    linear = linear_attention(given.query, given.key, given.value, spec, given.key_mask, given.mapped)
    return _update(linear, given.gate, given.branch, side, segments(side, tokens, video), tokens)


def _update(
    linear: Tensor, gate: Tensor | None, branch: BranchTensors, side: str, where: Segments, tokens: int
) -> Tensor:
    """What the linear branch adds, (B, H, S, value head_dim): for the video's rows, 0 elsewhere."""
    assert branch.proj_weight is not None
    assert branch.proj_bias is not None
    if side != "none":
        linear = linear[:, :, where.video_begin : where.video_end]
    linear = linear.transpose(1, 2)  # (B, V, H, head_dim)
    scaled = linear if branch.head_scale is None else linear * branch.head_scale.to(linear.dtype).unsqueeze(-1)
    update = _linear(scaled.flatten(2), branch.proj_weight, branch.proj_bias)
    if gate is not None:  # one for each head, or one for all
        update = (gate.unsqueeze(-1) * update.view_as(linear)).flatten(2)
    if branch.layer_scale is not None:
        update = update * branch.layer_scale.to(update.dtype)
    # under autocast F.linear may answer in 16 bits whatever it was given
    update = update.to(linear.dtype).view_as(linear).transpose(1, 2)
    if side != "none":
        update = F.pad(update, (0, 0, where.video_begin, tokens - where.video_end))
    return update


def _video_tokens(order: Tensor | None, text: Tensor | None, tokens: int) -> int:
    """How many of a single stream's tokens are video: as many as the order has, or all that are not text."""
    if order is not None:
        return order.shape[1]
    assert text is not None, "a joint sequence without an order and without its text"
    return tokens - text.shape[-2]
