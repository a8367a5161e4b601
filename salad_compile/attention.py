"""The definition of SALAD attention (arXiv 2601.16515), once, for tensors and for `fx.Proxy` objects alike.

Nothing here branches on shapes or on values, so that the same lines run eagerly and splice themselves into a graph.
The heavy parts are operators of `salad_compile.kernels`; everything else is plain ATen, which Inductor fuses.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import kernels as _kernels  # registers torch.ops.salad.*
from .config import AttentionSpec
from .geometry import joint_order

__all__ = [
    "BranchTensors",
    "Reordering",
    "Segments",
    "linear_attention",
    "reordering",
    "salad_attention",
    "segments",
    "sparse_and_linear_attention",
    "sparse_attention",
]

# Added to the normaliser of the linear branch, in fp32 (method.md section 5, our choice).
LINEAR_EPS = 1e-6

assert _kernels  # imported for its effect


class BranchTensors(NamedTuple):
    """Parameters of one site's linear branch. C is the width of the layer's input, D = heads * value head_dim.

    Shapes: gate_weight (C,), gate_bias (1,), proj_weight (D, D), proj_bias (D,). Any floating dtype: they are cast
    to the activations' dtype where they are used, so fp32 masters under 16-bit activations work without autocast.
    """

    gate_weight: Tensor
    gate_bias: Tensor
    proj_weight: Tensor
    proj_bias: Tensor


class Segments(NamedTuple):
    """Where video and text lie among the tokens that the operators see, for one call.

    Attributes:
        sink_begin, sink_end: the text: as keys always attended to, as queries dense. Empty where there is none.
        video_begin, video_end: the video.
    """

    sink_begin: int
    sink_end: int
    video_begin: int
    video_end: int


def segments(text: str, tokens: int, video: int) -> Segments:
    """Where the text lies (method.md section 4.4).

    Args:
        text: "none", "before" or "after" the video. tokens, video: lengths of the whole sequence and of the video.
    """
    if text == "none":
        return Segments(0, 0, 0, tokens)
    if text == "before":
        return Segments(0, tokens - video, tokens - video, tokens)
    return Segments(video, tokens, 0, video)


class Reordering(NamedTuple):
    """A permutation of all tokens of a call: int32 (S,) and its inverse. The video's tokens come first."""

    order: Tensor
    inverse: Tensor


def reordering(order: Tensor, text: str, tokens: int) -> Reordering:
    """The order of a whole sequence from that of its video's tokens: the text stays apart, behind them.

    Args:
        order: int32 (2, V), the order of the video's tokens and its inverse.
        text, tokens: see :func:`segments`.
    """
    if text == "none":
        return Reordering(order[0], order[1])
    count = tokens - order.shape[1]
    if text == "after":
        return Reordering(joint_order(order[0], count, False), joint_order(order[1], count, False))
    # native [text, video]: the text's tokens stand at positions V .. S - 1 of the order
    at = torch.arange(order.shape[1], tokens, dtype=torch.int32, device=order.device)
    return Reordering(joint_order(order[0], count, True), torch.cat((at, order[1])))


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    where: Segments,
    spec: AttentionSpec,
    scale: float,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Top-K routed block-sparse softmax attention (method.md section 4).

    Args:
        query, key, value: (B, H, S, head_dim), any strides, one floating dtype.
        where: video and text, see :func:`segments`.
        spec: block sizes and density.
        scale: factor of the scores, as in the attention call that is replaced.
        key_mask: bool (B, S), True where a key is valid, or None.

    Returns:
        (B, H, S, value head_dim) in the dtype of query. No gradient flows through the selection.
    """
    pooled_query = torch.ops.salad.pool_blocks.default(query.detach(), None, spec.query_block, key_mask)
    pooled_key = torch.ops.salad.pool_blocks.default(key.detach(), None, spec.key_block, key_mask)
    return _attend_selected(query, key, value, pooled_query, pooled_key, where, spec, scale, key_mask)


def linear_attention(query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec) -> Tensor:
    """Bidirectional linear attention over all tokens, rotate-then-map (method.md section 5).

    Args:
        query, key, value: (B, H, S, head_dim) as they reach softmax attention, after the position encoding.

    Returns:
        (B, H, S, value head_dim): phi(q) KV / (phi(q) z + eps), in the dtype of query.
    """
    state = torch.ops.salad.linear_state.default(key, value, spec.feature_map)
    out: Tensor = torch.ops.salad.linear_output.default(query, state[0], state[1], spec.feature_map, LINEAR_EPS)
    return out


def sparse_and_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    where: Segments,
    spec: AttentionSpec,
    scale: float,
    key_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`sparse_attention` and :func:`linear_attention`, reading each tensor once for the means and the sums.

    Args: see :func:`sparse_attention`.

    Returns:
        Both results, (B, H, S, value head_dim) in the dtype of query.
    """
    keys = torch.ops.salad.pool_and_summarise.default(key, value, None, spec.key_block, spec.feature_map, key_mask)
    queries = torch.ops.salad.pool_and_read.default(
        query, keys[1], keys[2], None, spec.query_block, spec.feature_map, LINEAR_EPS, key_mask
    )
    sparse = _attend_selected(query, key, value, queries[0], keys[0], where, spec, scale, key_mask)
    return sparse, queries[1]


def _attend_selected(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pooled_query: Tensor,
    pooled_key: Tensor,
    where: Segments,
    spec: AttentionSpec,
    scale: float,
    key_mask: Tensor | None,
) -> Tensor:
    """Softmax attention over the key blocks that the means of the blocks select."""
    blocks = (spec.query_block, spec.key_block)
    sinks = (where.sink_begin, where.sink_end)
    selected = torch.ops.salad.select_blocks.default(pooled_query, pooled_key, *blocks, spec.permille, *sinks, key_mask)
    attended = torch.ops.salad.block_sparse_attention.default(
        query, key, value, selected[0], selected[1], None, *blocks, scale, key_mask
    )
    out: Tensor = attended[0]
    return out


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight.to(x.dtype), bias.to(x.dtype))


def _gate(gate_input: Tensor, branch: BranchTensors, dtype: torch.dtype) -> Tensor:
    """sigmoid(x w_g + b_g), one number per token, (..., 1); the sigmoid is taken in `dtype` (method.md section 1)."""
    logits = torch.matmul(gate_input, branch.gate_weight.to(gate_input.dtype)).unsqueeze(-1)
    return torch.sigmoid((logits + branch.gate_bias.to(gate_input.dtype)).to(dtype))


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
) -> Tensor:
    """O' = O_sparse + sigmoid(x w_g + b_g) * Proj(O_linear), before the output projection (method.md section 2, v1).

    Of a joint sequence the rows of the video get all of this. Text rows are dense and have no linear branch: the branch
    makes up for what sparsity leaves out, and they leave out nothing (method.md section 4.4).

    Args:
        query: (B, H, S, head_dim), exactly what reaches softmax attention. With `spec.text` "prefix": the video's
            rows only.
        key, value: (B, H / spec.groups, S, head_dim).
        gate_input: x, the input of the query projection, (B, V, C), (B * V, C), or (V, C) when B is 1. V counts the
            video's tokens; with `spec.single` x holds the text as well, S tokens.
        branch: gate and projection of the site.
        order: int32 (2, V), the order of the video's tokens and its inverse; None is the native order.
        spec, scale: see :func:`sparse_attention`.
        dtype: dtype of the attention result that is replaced. Inside autocast query, key and value may differ from it,
            and operators of torch.library are not autocast.
        key_mask: bool (B, S), True where a key is valid, or None.
        text: with `spec.single`, and where there is no order: (B, S - V, any), whose length counts the text.

    Returns:
        (B, H, S, value head_dim) in `dtype`; with "prefix" the video's rows only.
    """
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    key, value = with_all_heads(key, spec.groups), with_all_heads(value, spec.groups)
    tokens, prefix = key.shape[2], spec.text == "prefix"
    gate = _gate(gate_input, branch, torch.promote_types(dtype, torch.float32)).to(dtype)
    gate = gate.reshape(query.shape[0], -1, 1)
    video = _video_tokens(order, text, tokens) if spec.single else gate.shape[1]
    if prefix:  # queries that nobody asked for, so that queries and keys are the same tokens
        query = F.pad(query, (0, 0, tokens - video, 0))
    text_side = "before" if prefix else spec.text
    if spec.token_order == "flat":
        order = None
    moved = None if order is None else reordering(order, text_side, tokens)
    if order is not None and moved is not None:
        query, key, value = (torch.ops.salad.take_rows.default(t, *moved) for t in (query, key, value))
        key_mask = None if key_mask is None else key_mask.index_select(1, moved.order)
        gate = (_in_segment(gate, text_side, tokens, video) if spec.single else gate).index_select(1, order[0])
        where = segments("none" if text_side == "none" else "after", tokens, video)
    else:
        where = segments(text_side, tokens, video)
        gate = _in_segment(gate, text_side, tokens, video) if spec.single else gate
    out = _sum(query, key, value, gate, branch, where, spec, scale, key_mask)
    if moved is not None:
        out = torch.ops.salad.take_rows.default(out, moved.inverse, moved.order)
    return out[:, :, tokens - video :] if prefix else out


def _in_segment(gate: Tensor, text: str, tokens: int, video: int) -> Tensor:
    """The video's rows (B, V, 1) of what a single stream holds, in native order."""
    where = segments(text, tokens, video)
    return gate[:, where.video_begin : where.video_end]


def _sum(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    branch: BranchTensors,
    where: Segments,
    spec: AttentionSpec,
    scale: float,
    key_mask: Tensor | None,
) -> Tensor:
    """O_sparse + gate * Proj(O_linear), the second for the video's rows; all tokens in the order of the blocks."""
    sparse, linear = sparse_and_linear_attention(query, key, value, where, spec, scale, key_mask)
    joint = spec.text != "none"
    if joint:
        linear = linear[:, :, where.video_begin : where.video_end]
    linear = linear.transpose(1, 2)  # (B, V, H, head_dim)
    update = gate * _linear(linear.flatten(2), branch.proj_weight, branch.proj_bias)
    # under autocast F.linear may answer in 16 bits whatever it was given
    update = update.to(sparse.dtype).view_as(linear).transpose(1, 2)
    if joint:
        tokens = query.shape[2]
        update = F.pad(update, (0, 0, where.video_begin, tokens - where.video_end))
    return sparse + update


def _video_tokens(order: Tensor | None, text: Tensor | None, tokens: int) -> int:
    """How many of a single stream's tokens are video: as many as the order has, or all that are not text."""
    if order is not None:
        return order.shape[1]
    assert text is not None, "a joint sequence without an order and without its text"
    return tokens - text.shape[-2]
