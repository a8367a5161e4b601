"""Regions of another precision in exported programs, as the passes read them: in one graph, between two marks.

torch.export makes a graph of its own of what runs under another autocast, or with gradients switched on or off:

    before                                                      after
    out = wrap_with_autocast(device, dtype, on, .., graph, x)   mark = _enter_autocast(device, dtype, on, ..)
    y = out[0]                                                  y = ... what the graph holds, on x
                                                                _exit_autocast(mark)

which is what Dynamo makes of it. A projection, the attention call and the position between them may then lie in several
regions. Gradients are for no one in a program for inference: those regions get no marks.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

# Private; seen in torch 2.11 and 2.13 (tests/salad_compile/backend/test_exported_regions.py).
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast

_AUTOCAST = torch.ops.higher_order.wrap_with_autocast
_GRADIENTS = torch.ops.higher_order.wrap_with_set_grad_enabled
_SETTINGS: dict[Any, int] = {_AUTOCAST: 4, _GRADIENTS: 1}
"""How many arguments come before the graph: device, dtype, enabled and cache_enabled, or whether gradients are on."""


def inline_regions(module: fx.GraphModule) -> None:
    """Put every such region, also those within others, in the graph that calls it."""
    if not any(True for _ in _regions(module.graph)):
        return
    while node := next(_regions(module.graph), None):
        _inline(module, node)
    module.delete_all_unused_submodules()
    module.recompile()


def _regions(graph: fx.Graph) -> Iterator[fx.Node]:
    return (node for node in graph.nodes if node.op == "call_function" and node.target in _SETTINGS)


def _inline(module: fx.GraphModule, node: fx.Node) -> None:
    count = _SETTINGS[node.target]
    settings, (inner, *arguments) = node.args[:count], node.args[count:]
    assert isinstance(inner, fx.Node)
    region = module.get_submodule(str(inner.target))
    assert isinstance(region, fx.GraphModule)
    graph = module.graph
    with graph.inserting_before(node):
        mark = graph.call_function(_enter_autocast, settings) if node.target is _AUTOCAST else None
        out = _copy(module, region, arguments)
        if mark is not None:
            graph.call_function(_exit_autocast, (mark,))
    if isinstance(out, fx.Node):
        node.replace_all_uses_with(out)
    else:
        for user in list(node.users):
            assert user.target is operator.getitem
            user.replace_all_uses_with(out[user.args[1]])
            graph.erase_node(user)
    graph.erase_node(node)
    if not inner.users:
        graph.erase_node(inner)


def _copy(module: fx.GraphModule, region: fx.GraphModule, arguments: list[Any]) -> Any:
    """Copy the nodes of a region to the place where nodes are inserted; what it returns."""
    known: dict[fx.Node, Any] = {}
    remaining = iter(arguments)
    for node in region.graph.nodes:
        if node.op == "placeholder":
            known[node] = next(remaining)
        elif node.op == "output":
            return fx.map_arg(node.args[0], known.__getitem__)
        else:
            known[node] = module.graph.node_copy(node, known.__getitem__)
            if node.op == "get_attr":
                known[node].target = _adopt(module, getattr(region, str(node.target)))
    return None


def _adopt(module: fx.GraphModule, value: Any) -> str:
    """Give a module what a region held; the name that is free for it."""
    name = next(name for name in (f"region_{number}" for number in itertools.count()) if not hasattr(module, name))
    setattr(module, name, value)
    return name
