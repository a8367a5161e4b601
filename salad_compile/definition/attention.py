"""The definition of SALAD attention (arXiv 2601.16515), once, for tensors and for `fx.Proxy` objects alike.

Nothing here branches on shapes or on values, so that the same lines run eagerly and splice themselves into a graph.
The heavy parts are operators of `salad_compile.kernels`; everything else is plain ATen, which Inductor fuses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from salad_compile import kernels as _kernels  # registers torch.ops.salad.*
from salad_compile.definition import patterns
from salad_compile.definition.compensation import TAIL_WEIGHT, tail_of
from salad_compile.definition.linear_branch import linear_state, update_of
from salad_compile.definition.operands import Mapped, Operands, move_operands, operands_of
from salad_compile.definition.pattern import BlockCall
from salad_compile.definition.spec import AttentionSpec
from salad_compile.definition.tensors import BranchTensors, cast
from salad_compile.definition.token_layout import Segments
from salad_compile.errors import SiteLostError
from salad_compile.kernels.block_sparse.api import attend
from salad_compile.kernels.direct import call_together
from salad_compile.kernels.exchange.api import backend_of, first_head, splits_heads
from salad_compile.kernels.selection import Selection

assert _kernels

OVERLAPPING_BACKENDS = {"gloo"}
"""Of torch.distributed, where the linear branch is computed while processes exchange heads and tokens: `overlaps`."""


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
        key, value: (B, H / spec.heads_per_key, S, head_dim).
        gate_input: x, the input of the query projection, (B, V, C), (B * V, C), or (V, C) when B is 1. V counts the
            video's tokens; with `spec.single` x holds the text as well, S tokens.
        branch: the site's tensors.
        order: int32 (2, V), the order of the video's tokens that the pattern asks for, and its inverse. None, with
            patterns that do not need the grid: the native order.
        spec, scale: see :func:`sparse_attention`.
        dtype: dtype of the attention result that is replaced. Inside autocast query, key and value may differ from it,
            and operators of torch.library are not autocast.
        key_mask: bool (B, S), True where a key is valid, or None; not with patterns that take no mask.
        text: with `spec.single`, and where there is no order: (B, S - V, any), whose length counts the text.
        mapped: with `spec.rope_placement` "map-then-rotate". None: there is no position encoding between projection and
            call, so that the two placements are one.

    Returns:
        (B, H, S, value head_dim) in `dtype`; with "prefix" the video's rows only.
    """
    given = operands_of(query, key, value, gate_input, branch, order, spec, dtype, key_mask, text, mapped)
    return salad_of(given, spec, scale)


def salad_of(given: Operands, spec: AttentionSpec, scale: float) -> Tensor:
    """:func:`salad_attention` of its operands."""
    tensors = (given.query, given.key, given.value, given.gate, given.order, given.key_mask)
    out: Tensor = call_together(
        (*tensors, *given.branch.values(), *(given.mapped or ())), _salad_of, given, spec, scale
    )
    return out


def _salad_of(given: Operands, spec: AttentionSpec, scale: float) -> Tensor:
    if spec.process_group:
        return _across_processes(given, spec, scale)
    arranged = patterns.find(spec.pattern).arrange(given, spec)
    moved = move_operands(given, arranged)
    out = sparse_attention(
        moved.query, moved.key, moved.value, arranged.where, spec, scale, moved.key_mask, moved.branch
    )
    # the update of the rows as they were moved, which are in memory anyway
    with_moved = spec.linear_branch and given.mapped is None and arranged.heads is None
    out = arranged.move_back(out + cast(update_of(moved, spec), out.dtype) if with_moved else out)
    if spec.linear_branch and not with_moved:
        out = out + cast(update_of(given, spec), out.dtype)
    return out[:, :, given.tokens - given.video :] if spec.text == "prefix" else out


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    where: Segments,
    spec: AttentionSpec,
    scale: float,
    key_mask: Tensor | None = None,
    branch: BranchTensors | None = None,
) -> Tensor:
    """Softmax attention over the key blocks that the pattern selects, and the pools of the others (specification 4).

    Args:
        query, key, value: (B, H, S, head_dim), any strides, one floating dtype; their tokens as the pattern's `arrange`
            moves them.
        where: video and text, see :func:`salad_compile.definition.token_layout.segments`.
        spec: pattern, block sizes and density.
        scale: factor of the scores, as in the attention call that is replaced.
        key_mask: bool (B, S), True where a key is valid, or None.
        branch: the site's tensors; None where the pattern brings none and the density is fixed.

    Returns:
        (B, H, S, value head_dim) in the dtype of query. No gradient flows through the selection.
    """
    call = BlockCall(query, key, value, where, key_mask, branch or {}, scale)
    selected = patterns.find(spec.pattern).select(call, spec)
    shares_heads = splits_heads(spec.process_group)
    if shares_heads:  # query blocks that others attend with select nothing, and give 0
        selected = selected._replace(count=torch.ops.salad.own_blocks.default(selected.count, spec.process_group))
    selection = Selection(selected.lut, selected.count, spec.query_block, spec.key_block, scale, key_mask)
    if spec.compensation == "tail":
        tail = tail_of(call, selected, spec)
        if shares_heads:
            own = torch.ops.salad.own_blocks.default(tail.tokens, spec.process_group)
            tail = tail._replace(tokens=own)
        out: Tensor = torch.ops.salad.attend_with_tail.default(query, key, value, *tail, *selection)[0]
        return out
    return attend(query, key, value, selection)


def _across_processes(given: Operands, spec: AttentionSpec, scale: float) -> Tensor:
    """:func:`salad_of`, of this process's tokens.

    Sparse attention gets all tokens of a part of the heads. Gate and projection belong to tokens, and of the linear
    branch the processes need to know only their sums over tokens: it stays where its tokens are.
    """
    if given.key_mask is not None:
        raise SiteLostError("attention masks and tokens that are split over processes do not go together.")
    group, salad = spec.process_group, torch.ops.salad
    tensors = (given.query, given.key, given.value)
    state, overlapped = None, overlaps(group)
    if overlapped:
        under_way = [salad.start_tokens.default(t, group) for t in tensors]
        if spec.linear_branch:
            state = linear_state(given.key, given.value, spec, None, given.mapped)
        query, key, value = (salad.finish_tokens.default(t, group) for t in under_way)
    else:
        query, key, value = (salad.gather_tokens.default(t, group) for t in tensors)
    branch = _of_own_heads(given.branch, spec, query.shape[1])
    whole = given._replace(query=query, key=key, value=value, branch=branch, side="none", video=key.shape[2])
    arranged = patterns.find(spec.pattern).arrange(whole, spec)
    query, key, value = (arranged.move(t) for t in (query, key, value))
    out: Tensor = arranged.move_back(sparse_attention(query, key, value, arranged.where, spec, scale, None, branch))
    if not overlapped:
        out = salad.gather_heads.default(out, group)
        return out + cast(update_of(given, spec), out.dtype) if spec.linear_branch else out
    out = salad.start_heads.default(out, group)
    update = cast(update_of(given, spec, state), out.dtype) if spec.linear_branch else None
    out = salad.finish_heads.default(out, group)
    return out if update is None else out + update


def overlaps(group: str) -> bool:
    """Whether the linear branch is computed while heads and tokens are exchanged: where whole heads are, over gloo.

    Over NCCL that was never run. What was run there is the exchange in one piece, so GPUs keep to it.
    """
    return not splits_heads(group) and backend_of(group) in OVERLAPPING_BACKENDS


def _of_own_heads(branch: BranchTensors, spec: AttentionSpec, heads: int) -> BranchTensors:
    """The tensors of a branch, those of sparse attention's heads cut to the `heads` that this process attends with."""
    rows = (TAIL_WEIGHT, *patterns.find(spec.pattern).tensors)
    cut = [row.name for row in rows if row.by_head and row.name in branch]
    if not cut:
        return branch
    first = first_head(spec.process_group, heads)
    return {**branch, **{name: branch[name][first : first + heads] for name in cut}}
