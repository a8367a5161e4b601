"""The norm before position: over the channels of one head, or of all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from salad_compile.position.channel_rules import AXIS_MOVES, RESHAPES, SAME
from salad_compile.position.operations import operation

Value = Callable[[fx.Node], Any]
"""What was recorded for a node."""


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


def find_norm(start: fx.Node, value: Value) -> tuple[Norm | None, fx.Node, list[fx.Node]]:
    """The norm that a value comes from by views and casts alone, what it gives, and these in order.

    Without a norm: None, what the value comes from by casts alone, and these.
    """
    chain: list[fx.Node] = []
    node: Any = start
    while isinstance(node, fx.Node) and node.op in ("call_function", "call_method"):
        name, written = operation(node)
        norm = None if written else _norm(node, name, value)
        if norm is not None:
            return norm, node, chain[::-1]
        if written or (name not in SAME and name not in RESHAPES and name not in AXIS_MOVES):
            break
        chain.append(node)
        node = node.args[0] if node.args else None
    rows = _without_casts(start)
    casts = len(chain) if rows is node else chain.index(rows)
    return None, rows, chain[:casts][::-1]


def _norm(node: fx.Node, name: str, value: Value) -> Norm | None:
    if name == "rms_norm":
        return _function(node, value, "rms", ("input", "normalized_shape", "weight", "eps"))
    if name == "layer_norm":
        return _function(node, value, "layer", ("input", "normalized_shape", "weight", "bias", "eps"))
    return _written_out(node, value) if name == "mul" else None


def _function(node: fx.Node, value: Value, kind: str, names: Sequence[str]) -> Norm | None:
    """torch's own norms, over the last dimension alone."""
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    rows, shape, eps = given["input"], given["normalized_shape"], given.get("eps", 1e-5 if kind == "layer" else None)
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    over = _over(rows, value)
    if not over or len(shape) != 1 or not isinstance(eps, float):
        return None
    return Norm(node, rows, kind, over, eps, given.get("weight"), given.get("bias"))


def _over(rows: Any, value: Value) -> str:
    """What the last dimension of projected rows holds: a "head", or the whole "width"; "" if neither."""
    recorded = value(rows) if isinstance(rows, fx.Node) else None
    return {3: "width", 4: "head"}.get(recorded.dim(), "") if isinstance(recorded, torch.Tensor) else ""


def _written_out(node: fx.Node, value: Value) -> Norm | None:
    """An RMSNorm of single operations: x rsqrt(mean(x^2) + eps), by a weight or not."""
    weight, product = None, node
    for factor, other in (node.args[:2], node.args[1::-1]):
        recorded = value(factor) if isinstance(factor, fx.Node) else None
        if isinstance(recorded, torch.Tensor) and recorded.dim() == 1 and isinstance(other, fx.Node):
            weight, product = factor, _without_casts(other)
    if operation(product)[0] != "mul" or len(product.args) != 2:
        return None
    for scale, rows in (product.args, product.args[::-1]):
        eps, squared = _inverse_root(scale)
        if isinstance(rows, fx.Node) and squared is not None and _without_casts(rows) is _without_casts(squared):
            rows = _without_casts(rows)
            over = _over(rows, value)
            fits = weight is None or value(weight).shape[0] == value(rows).shape[-1]  # type: ignore[arg-type]
            whole = _is_wide_enough((rows, squared, product), value)
            return Norm(node, rows, "rms", over, eps, weight, None) if over and fits and whole else None  # type: ignore[arg-type]
    return None


def _inverse_root(node: Any) -> tuple[float, fx.Node | None]:
    """eps and x of rsqrt(mean(x^2 over the last dimension) + eps); x is None where it is something else."""
    nothing = 0.0, None
    if not isinstance(node, fx.Node) or operation(node)[0] != "rsqrt":
        return nothing
    total: Any = node.args[0]
    if not isinstance(total, fx.Node) or operation(total)[0] != "add" or len(total.args) != 2 or total.kwargs:
        return nothing
    mean, eps = total.args if isinstance(total.args[0], fx.Node) else total.args[::-1]
    if not isinstance(mean, fx.Node) or operation(mean)[0] != "mean" or not isinstance(eps, float):
        return nothing
    given: dict[str, Any] = dict(zip(("input", "dim", "keepdim"), mean.args, strict=False)) | dict(mean.kwargs)
    square: Any = given.pop("input")
    if given not in ({"dim": -1, "keepdim": True}, {"dim": [-1], "keepdim": True}, {"dim": (-1,), "keepdim": True}):
        return nothing
    name = operation(square)[0] if isinstance(square, fx.Node) else ""
    arguments: tuple[Any, ...] = square.args if name else ()
    squares = name == "square" or (name == "pow" and arguments[1:] == (2,))
    squares = squares or (name == "mul" and len(arguments) == 2 and arguments[0] is arguments[1])
    return (eps, arguments[0]) if squares and isinstance(arguments[0], fx.Node) else nothing


def _is_wide_enough(nodes: Sequence[fx.Node], value: Value) -> bool:
    """Whether nothing is rounded to less than the rows have, the first of these, and squares are summed in fp32."""
    dtypes = [value(node).dtype for node in nodes]
    sums = dtypes[1].itemsize >= 4
    return sums and all(dtype == dtypes[0] or dtype.itemsize > dtypes[0].itemsize for dtype in dtypes)


def _without_casts(node: fx.Node) -> fx.Node:
    """What a value is a cast or a copy of."""
    while node.op in ("call_function", "call_method") and operation(node)[0] in SAME and not operation(node)[1]:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node = source
    return node
