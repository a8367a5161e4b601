"""Appending to a graph in the name of a node that is replaced."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch.fx.proxy import GraphAppendingTracer

# What a spliced node inherits from the attention node: where it came from. Its value is its own.
_INHERITED_META = ("stack_trace", "nn_module_stack", "source_fn_stack")


class SplicingTracer(GraphAppendingTracer):
    """Appends to a graph what is called on its proxies, and hands on the replaced node's origin."""

    def __init__(self, graph: fx.Graph, origin: fx.Node) -> None:
        super().__init__(graph)
        self.inherited = {name: origin.meta[name] for name in _INHERITED_META if name in origin.meta}

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta.update(self.inherited)
        return node
