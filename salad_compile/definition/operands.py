"""The tensors of one attention call in one form: one dtype, all heads, queries and keys of the same tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from salad_compile.definition.gate import gate_of
from salad_compile.definition.spec import AttentionSpec
from salad_compile.definition.tensors import BranchTensors, cast
from salad_compile.definition.token_layout import Arrangement, segments


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


class Operands(NamedTuple):
    """Tensors of one call with one dtype, all heads and, with "prefix", a row of zeros for each query of the text.

    Attributes:
        gate: (B, V, 1 or H) for the video's rows, or None.
        side: where the text lies, never "prefix".
        video: V, how many tokens are video.
        query, key, value, branch, order, key_mask, mapped: see :func:`salad_compile.definition.attention.
            salad_attention`.
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

    @property
    def tokens(self) -> int:
        """S, how many tokens there are."""
        return self.key.shape[2]


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
    """Of the arguments of :func:`salad_compile.definition.attention.salad_attention`."""
    query, key, value = cast(query, dtype), cast(key, dtype), cast(value, dtype)
    mapped = mapped if spec.linear_branch else None
    key, value = with_all_heads(key, spec.heads_per_key), with_all_heads(value, spec.heads_per_key)
    tokens, prefix = key.shape[2], spec.text == "prefix"
    if spec.gate_order:
        gate_input = gate_input.permute(*spec.gate_order, len(spec.gate_order))
    gate_input = gate_input.reshape(query.shape[0], -1, gate_input.shape[-1])
    video = _video_tokens(order, text, tokens) if spec.single else gate_input.shape[1]
    if prefix:  # queries that nobody asked for, so that queries and keys are the same tokens
        query = F.pad(query, (0, 0, tokens - video, 0))
    side = "before" if prefix else spec.text
    gate = gate_of(gate_input, branch, spec, dtype)
    if gate is not None and spec.single:  # the video's rows of what the stream holds
        where = segments(side, tokens, video)
        gate = gate[:, where.video_begin : where.video_end]
    if mapped is not None:
        mapped = _like_operands(mapped, spec, dtype, tokens - video if prefix else 0)
    return Operands(query, key, value, gate, branch, order, key_mask, mapped, side, video)


def move_operands(given: Operands, arranged: Arrangement) -> Operands:
    """Everything but `mapped`, its tokens moved; the gate only where all heads are."""
    query, key, value = arranged.move(given.query), arranged.move(given.key), arranged.move(given.value)
    if arranged.moved is None or arranged.heads is not None:
        return given._replace(query=query, key=key, value=value)
    assert given.order is not None
    return given._replace(
        query=query,
        key=key,
        value=value,
        key_mask=None if given.key_mask is None else given.key_mask.index_select(1, arranged.moved.order),
        gate=None if given.gate is None else given.gate.index_select(1, given.order[0]),
        side="none" if given.side == "none" else "after",
    )


def with_all_heads(tensor: Tensor, heads_per_key: int) -> Tensor:
    """(B, H / heads_per_key, S, D) -> (B, H, S, D): each key or value head once for each query head that shares it."""
    return tensor if heads_per_key == 1 else tensor.repeat_interleave(heads_per_key, dim=1)


def _like_operands(mapped: Mapped, spec: AttentionSpec, dtype: torch.dtype, padding: int) -> Mapped:
    """With the dtype, the heads and the padding that query and key have got."""
    query, key = cast(mapped.query, dtype), cast(mapped.key, dtype)
    rotated_query, rotated_key = cast(mapped.rotated_query, dtype), cast(mapped.rotated_key, dtype)
    key, rotated_key = with_all_heads(key, spec.heads_per_key), with_all_heads(rotated_key, spec.heads_per_key)
    if spec.text == "prefix":
        query, rotated_query = F.pad(query, (0, 0, padding, 0)), F.pad(rotated_query, (0, 0, padding, 0))
    return Mapped(query, key, rotated_query, rotated_key)


def _video_tokens(order: Tensor | None, text: Tensor | None, tokens: int) -> int:
    """How many of a single stream's tokens are video: as many as the order has, or all that are not text."""
    if order is not None:
        return order.shape[1]
    assert text is not None, "a joint sequence without an order and without its text"
    return tokens - text.shape[-2]
