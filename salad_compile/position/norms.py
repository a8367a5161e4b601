"""The norm before position: over the channels of one head, or of all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from salad_compile.position.channel_rules import AXIS_MOVES, RESHAPES, SAME
from salad_compile.position.operations import operation


@dataclass(frozen=True)
class Norm:
    """A norm as `salad::prepare_operand` computes it.

    Attributes:
        node: its result. rows: what it normalises. kind: "rms" or "layer". over: "head" or "width".
        weight, bias: nodes, or None.
    """

    node: fx.Node
    rows: fx.Node
    kind: str
    over: str
    eps: float
    weight: fx.Node | None
    bias: fx.Node | None


def find_norm(start: fx.Node, value: Callable[[fx.Node], Any]) -> tuple[Norm | None, list[fx.Node]]:
    """The norm that a value comes from by views alone, and these views in order; or None, and nothing."""
    chain: list[fx.Node] = []
    node: Any = start
    while isinstance(node, fx.Node) and node.op in ("call_function", "call_method"):
        name, written = operation(node)
        if written:
            break
        if name in _FUNCTIONS:
            norm = _FUNCTIONS[name](node, value)
            return (norm, chain[::-1]) if norm is not None else (None, [])
        if name not in SAME and name not in RESHAPES and name not in AXIS_MOVES:
            break
        chain.append(node)
        node = node.args[0] if node.args else None
    return None, []


def _function(node: fx.Node, value: Callable[[fx.Node], Any], kind: str, names: tuple[str, ...]) -> Norm | None:
    """torch's own norms: over the last dimension alone."""
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    rows, shape, eps = given["input"], given["normalized_shape"], given.get("eps", 1e-5 if kind == "layer" else None)
    recorded = value(rows)
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    if not isinstance(recorded, torch.Tensor) or len(shape) != 1 or not isinstance(eps, float):
        return None
    over = "head" if recorded.dim() == 4 else "width"
    return Norm(node, rows, kind, over, eps, given.get("weight"), given.get("bias"))


_FUNCTIONS: dict[str, Callable[[fx.Node, Callable[[fx.Node], Any]], Norm | None]] = {
    "rms_norm": lambda node, value: _function(node, value, "rms", ("input", "normalized_shape", "weight", "eps")),
    "layer_norm": lambda node, value: _function(
        node, value, "layer", ("input", "normalized_shape", "weight", "bias", "eps")
    ),
}
