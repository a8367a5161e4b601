"""Appending to a graph in the name of a node that is replaced."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

# Private; what Dynamo and export record for each node, and how (torch 2.11 and 2.13; tests/passes/test_splicing.py).
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.proxy import GraphAppendingTracer
from torch.utils._pytree import tree_leaves

from salad_compile.passes.provenance import example_value

# What a spliced node inherits from the attention node: where it came from. Its value is its own.
_INHERITED_META = ("stack_trace", "nn_module_stack", "source_fn_stack")


class SplicingTracer(GraphAppendingTracer):
    """Appends to a graph what is called on its proxies, and hands on the replaced node's origin.

    Each node gets the fake value that it computes, as Dynamo records it: AOTAutograd's cache takes no graph with a
    method call on a node of which that is not known.
    """

    def __init__(self, graph: fx.Graph, origin: fx.Node) -> None:
        super().__init__(graph)
        self.inherited = {name: origin.meta[name] for name in _INHERITED_META if name in origin.meta}
        self.mode = _fake_mode(origin)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta.update(self.inherited)
        known = all(example_value(parent) is not None for parent in node.all_input_nodes)
        if self.mode is not None and known:
            with self.mode, enable_python_dispatcher(), torch.no_grad():  # the latter for symbolic sizes
                node.meta["example_value"] = _run(node)
        return node


def _fake_mode(node: fx.Node) -> FakeTensorMode | None:
    """The mode of a node's recorded value; by the time of a backend Dynamo's own has changed."""
    return next((leaf.fake_mode for leaf in tree_leaves(example_value(node)) if isinstance(leaf, FakeTensor)), None)


def _run(node: fx.Node) -> Any:
    """What a node computes from the recorded values of its arguments."""
    args, kwargs = (fx.map_arg(given, example_value) for given in (node.args, node.kwargs))  # type: ignore[arg-type]
    assert isinstance(args, tuple)
    assert isinstance(kwargs, dict)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)
