"""A graph as text that a reader can compare, and that does not depend on names that Dynamo makes up."""

from __future__ import annotations

import operator
import re
from typing import Any

import torch
from torch import fx

from salad_compile.passes.provenance import example_value

_DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64", torch.bool: "b8"}


def golden_text(graph: fx.Graph) -> str:
    """One line for each node that the output needs: its number, what it calls, and dtype and shape of its result.

    Inputs have the name of the parameter or argument that they are, without Dynamo's decoration; "x" has none.
    """
    needed, todo = set(), [next(node for node in graph.nodes if node.op == "output")]
    while todo:
        node = todo.pop()
        if node not in needed:
            needed.add(node)
            # in-place writers of a value are needed as well
            writers = [user for user in node.users if user.target is operator.setitem and user.args[0] is node]
            todo += [*node.all_input_nodes, *writers]
    names: dict[fx.Node, str] = {}
    lines = []
    for node in graph.nodes:
        if node not in needed:
            continue
        if node.op == "placeholder":
            names[node] = _input_name(str(node.target))
            continue
        names[node] = f"%{len(lines)}"
        lines.append(f"{names[node]} = {_call(node, names)}{_result(example_value(node))}")
    return "\n".join(lines).replace(f"%{len(lines) - 1} = output", "output") + "\n"


def _input_name(target: str) -> str:
    name = re.sub(r"(^|_)(L|l|self|modules|parameters|buffers|args|original|\d+)(?=_|$)", "", target)
    return re.sub(r"_+", "_", name).strip("_") or "x"


def _call(node: fx.Node, names: dict[fx.Node, str]) -> str:
    def show(value: Any) -> str:
        if isinstance(value, fx.Node):
            return names[value]
        if isinstance(value, (tuple, list)):
            return f"({', '.join(map(show, value))})"
        if isinstance(value, slice):
            return ":".join("" if part is None else show(part) for part in (value.start, value.stop, value.step))
        return f"{value:.6g}" if isinstance(value, float) else str(value)

    if node.target is operator.getitem:
        return f"{show(node.args[0])}[{show(node.args[1])}]"
    given = [*map(show, node.args), *(f"{name}={show(value)}" for name, value in sorted(node.kwargs.items()))]
    if str(node.target).startswith("salad."):
        name = str(node.target).removesuffix(".default")
    else:
        name = str(getattr(node.target, "__name__", node.target))
    return f"{name}({', '.join(given)})"


def _result(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"  # {_DTYPES.get(value.dtype, str(value.dtype))}{list(value.shape)}"
    return ""
