"""Autograd Functions around attention: their forward in the graph itself, where the call in it is rewritten.

    before                                           after
    out = autograd_function_apply(fwd, bwd, q, k, v)  q_ = contiguous(q); ...; out_, lse = flash_forward(q_, k_, v_)

The Function's own backward belongs to the dense attention in it; without the Function autograd follows the operations
of the forward, of which the attention is about to be replaced by one that has gradients. A Function whose attention
stays dense stays as it is.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from salad_compile.passes.provenance import erase_dead

# Not documented: what Dynamo makes of a Function's `apply`. Seen in torch 2.11 and 2.13;
# tests/salad_compile/calls/test_flash_family.py fails when it changes.
APPLY = torch.ops.higher_order.autograd_function_apply
_DETACH = ("detach", "detach_", torch.detach, torch.Tensor.detach)
_VALUES = ("example_value", "val")


@dataclass(frozen=True)
class OpenFunction:
    """One call of a Function, and the nodes of its forward, which nothing reads yet.

    copied: in order. results: what the forward returns, of its own nodes.
    """

    node: fx.Node
    copied: tuple[fx.Node, ...]
    results: tuple[Any, ...]

    def take_over(self) -> None:
        """Let the graph read the copied forward, and erase the call of the Function."""
        for user in list(self.node.users):
            assert user.target is operator.getitem
            position = user.args[1]
            assert isinstance(position, int)
            result = self.results[position]
            user.replace_all_uses_with(result)
            user.graph.erase_node(user)
        self.node.graph.erase_node(self.node)

    def discard(self) -> None:
        """Erase the copied forward."""
        for node in reversed(self.copied):
            erase_dead(node)


def function_body(node: fx.Node) -> fx.Graph | None:
    """The graph of the forward of a Function that a node calls."""
    if node.op != "call_function" or node.target is not APPLY or node.graph.owning_module is None:
        return None
    forward = node.args[0]
    assert isinstance(forward, fx.Node)
    graph = getattr(node.graph.owning_module.get_submodule(str(forward.target)), "graph", None)
    return graph if isinstance(graph, fx.Graph) else None


def open_function(node: fx.Node, body: fx.Graph) -> OpenFunction | None:
    """Copy the forward of a Function before its call, or None if that is not possible."""
    placeholders = [inner for inner in body.nodes if inner.op == "placeholder"]
    given = [*[None] * (len(placeholders) - len(node.args) + 2), *node.args[2:]]
    if len(given) != len(placeholders) or any(inner.op in ("get_attr", "call_module") for inner in body.nodes):
        return None
    returned = body.output_node().args[0]
    results = returned[0] if isinstance(returned, (tuple, list)) and returned else None
    only_parts = all(user.target is operator.getitem for user in node.users)
    if not isinstance(results, (tuple, list, fx.Node)) or not only_parts:
        return None
    known: dict[fx.Node, Any] = dict(zip(placeholders, given, strict=True))
    copied: list[fx.Node] = []
    with node.graph.inserting_before(node):
        for inner in body.nodes:
            if inner.op in ("placeholder", "output") or inner.target is torch._C._set_grad_enabled:
                continue
            if inner.target in _DETACH:
                known[inner] = known[inner.args[0]]
                continue
            known[inner] = node.graph.node_copy(inner, known.__getitem__)
            known[inner].meta.update({key: value for key, value in node.meta.items() if key not in _VALUES})
            copied.append(known[inner])
    parts = results if isinstance(results, (tuple, list)) else (results,)
    return OpenFunction(
        node, tuple(copied), tuple(known[part] if isinstance(part, fx.Node) else part for part in parts)
    )
