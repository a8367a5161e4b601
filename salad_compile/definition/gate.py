"""The gate of the linear branch (specification 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from salad_compile.definition.spec import AttentionSpec
from salad_compile.definition.tensors import BranchSite, BranchTensors, TensorRow, cast


def _has_gate(spec: AttentionSpec) -> bool:
    return spec.linear_branch and spec.gate != "none"


def _per_head(site: BranchSite, spec: AttentionSpec) -> tuple[int, ...]:
    return (site.heads,) if spec.gate == "head" else ()


# Both zero, so that every gate starts half open: the projection starts at zero, and two factors that do would never
# train (specification 6).
GATE = (
    TensorRow(
        "gate_weight",
        shape=lambda site, spec: (site.gate_width, *_per_head(site, spec)),
        when=_has_gate,
        cost="linear",
    ),
    TensorRow("gate_bias", shape=lambda site, spec: _per_head(site, spec) or (1,), when=_has_gate),
)
"""w_g, (C,) or with one gate per head (C, H); b_g, (1,) or (H,)."""


def gate_of(gate_input: Tensor, branch: BranchTensors, spec: AttentionSpec, dtype: torch.dtype) -> Tensor | None:
    """sigmoid(x w_g + b_g), or None without a gate.

    Args:
        gate_input: x, (B, rows, C).

    Returns:
        (B, rows, 1), or (B, rows, H) with one gate per head, in `dtype`.
    """
    if not _has_gate(spec):
        return None
    logits = torch.matmul(gate_input, cast(branch["gate_weight"], gate_input.dtype))
    logits = logits.unsqueeze(-1) if spec.gate == "token" else logits
    logits = logits + cast(branch["gate_bias"], gate_input.dtype)
    # the sigmoid is taken in fp32 (specification 1)
    return cast(torch.sigmoid(cast(logits, torch.promote_types(dtype, torch.float32))), dtype)
