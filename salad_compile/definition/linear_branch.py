"""What the linear branch adds to sparse attention: linear attention, its projection, gate and scales."""

from __future__ import annotations

from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from salad_compile.definition.operands import Mapped, Operands
from salad_compile.definition.spec import AttentionSpec
from salad_compile.definition.tensors import BranchTensors, TensorRow, cast, ones
from salad_compile.definition.token_layout import segments
from salad_compile.kernels.direct import call_operator
from salad_compile.kernels.exchange import api as _head_exchange  # registers torch.ops.salad.*

# Added to the normaliser of the linear branch, in fp32 (specification 5, our choice).
LINEAR_EPS = 1e-6

State: TypeAlias = tuple[Tensor, Tensor]

assert _head_exchange


def _has_branch(spec: AttentionSpec) -> bool:
    return spec.linear_branch


def _has_scales(spec: AttentionSpec) -> bool:
    return spec.linear_branch and spec.scaling == "v2"


PROJECTION = (
    TensorRow("proj_weight", shape=lambda site, spec: (site.width, site.width), when=_has_branch, cost="projection"),
    TensorRow("proj_bias", shape=lambda site, spec: (site.width,), when=_has_branch),
)
"""Zero at the start, so that a freshly converted model computes pure block-sparse attention (specification 6)."""

SCALES = (
    TensorRow("layer_scale", shape=lambda site, spec: (), when=_has_scales, initialise=ones),
    TensorRow("head_scale", shape=lambda site, spec: (site.heads,), when=_has_scales, initialise=ones),
)
"""The static scales of the "v2" scaling (specification 3)."""


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spec: AttentionSpec,
    key_mask: Tensor | None = None,
    mapped: Mapped | None = None,
    state: State | None = None,
) -> Tensor:
    """Bidirectional linear attention over all tokens (specification 5).

    Args:
        query, key, value: (B, H, S, head_dim) as they reach softmax attention, after the position encoding.
        key_mask: bool (B, S), True where a key is valid, or None.
        mapped: for map-then-rotate; then query and key are not read.
        state: of :func:`linear_state`, if it was computed before; then key and value are not read.

    Returns:
        (B, H, S, value head_dim): phi(q) KV / (phi(q) z + eps), in the dtype of query.
    """
    if state is None:
        state = linear_state(key, value, spec, key_mask, mapped)
    rotated_query = None
    if mapped is not None:
        query, rotated_query = mapped.query, mapped.rotated_query
    out: Tensor = call_operator(
        torch.ops.salad.linear_output.default, query, state[0], state[1], spec.feature_map, LINEAR_EPS, rotated_query
    )
    return out


def linear_state(
    key: Tensor, value: Tensor, spec: AttentionSpec, key_mask: Tensor | None = None, mapped: Mapped | None = None
) -> State:
    """KV and z: sums over all tokens. The arguments are those of :func:`linear_attention`.

    With `spec.process_group` the tokens are those of this process, and the sums run over all processes.
    """
    rotated_key = None
    if mapped is not None:
        key, rotated_key = mapped.key, mapped.rotated_key
    state = call_operator(torch.ops.salad.linear_state.default, key, value, spec.feature_map, key_mask, rotated_key)
    if spec.process_group:
        state = [torch.ops.salad.sum_of_processes.default(state[i], spec.process_group) for i in range(2)]
    return state[0], state[1]


def update_of(given: Operands, spec: AttentionSpec, state: State | None = None) -> Tensor:
    """What the linear branch adds, (B, H, S, value head_dim), in the native order: its sums do not depend on one."""
    linear = linear_attention(given.query, given.key, given.value, spec, given.key_mask, given.mapped, state)
    where = segments(given.side, given.tokens, given.video)
    if given.side != "none":
        linear = linear[:, :, where.video_begin : where.video_end]
    update = project(linear, given.gate, given.branch, spec)
    if given.side != "none":  # text rows get nothing
        update = F.pad(update, (0, 0, where.video_begin, given.tokens - where.video_end))
    return update


def project(linear: Tensor, gate: Tensor | None, branch: BranchTensors, spec: AttentionSpec) -> Tensor:
    """s_layer G Proj(s_head O_l) (specification 2 and 3).

    Args:
        linear: O_l, (B, H, V, value head_dim), of the video's rows. gate: G, (B, V, 1 or H), or None.

    Returns:
        The same shape and dtype as `linear`.
    """
    linear = linear.transpose(1, 2)  # (B, V, H, head_dim)
    scaled = linear * cast(branch["head_scale"], linear.dtype).unsqueeze(-1) if _has_scales(spec) else linear
    scaled = scaled.flatten(2)
    update = F.linear(scaled, cast(branch["proj_weight"], scaled.dtype), cast(branch["proj_bias"], scaled.dtype))
    if gate is not None:  # one for each head, or one for all
        update = (gate.unsqueeze(-1) * update.view_as(linear)).flatten(2)
    if _has_scales(spec):
        update = update * cast(branch["layer_scale"], update.dtype)
    # under autocast F.linear may return 16 bits whatever it was given
    return cast(update, linear.dtype).view_as(linear).transpose(1, 2)
