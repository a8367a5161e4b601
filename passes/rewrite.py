"""AttentionCall -> SALAD subgraph, by running the one definition of attention.py on `fx.Proxy` objects."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch.fx.proxy import GraphAppendingTracer, Proxy

from ..attention import BranchTensors, salad_attention, sparse_attention
from ..config import AttentionSpec, BackendOptions
from .find_attention import CONVERTED, TRAINING_FREE, AttentionCall

# What a spliced node inherits from the attention node: where it came from. Its value is its own.
_INHERITED_META = ("stack_trace", "nn_module_stack", "source_fn_stack")


class _SplicingTracer(GraphAppendingTracer):
    """Appends to a graph what is called on its proxies, and hands on the replaced node's origin."""

    def __init__(self, graph: fx.Graph, origin: fx.Node) -> None:
        super().__init__(graph)
        self.inherited = {name: origin.meta[name] for name in _INHERITED_META if name in origin.meta}

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta.update(self.inherited)
        return node


def rewrite(call: AttentionCall, options: BackendOptions) -> None:
    """Splice the subgraph of a converted or a training-free call in the place of its attention node."""
    if call.status == CONVERTED:
        _splice(call, _converted)
    elif call.status == TRAINING_FREE:
        _splice(call, lambda call, proxy: _training_free(call, proxy, options.spec))


def _splice(call: AttentionCall, definition: Any) -> None:
    graph = call.node.graph
    tracer = _SplicingTracer(graph, call.node)
    with graph.inserting_before(call.node):
        out = definition(call, lambda node: Proxy(node, tracer))
    call.replace_with(out.node)


def _converted(call: AttentionCall, proxy: Any) -> Proxy:
    assert call.tag is not None
    _, gate_input, params, order, spec = call.tag.args
    assert isinstance(params, (list, tuple))
    query, key, value = (proxy(n) for n in (call.arguments.query, call.arguments.key, call.arguments.value))
    out: Any = salad_attention(
        query,
        key,
        value,
        proxy(gate_input),
        BranchTensors(*(proxy(node) for node in params)),
        None if order is None else proxy(order),
        AttentionSpec.decode(str(spec)),
        scale=call.scale,
        dtype=call.dtype,
    )
    return out  # type: ignore[no-any-return]


def _training_free(call: AttentionCall, proxy: Any, spec: AttentionSpec) -> Proxy:
    """A projection that starts at zero contributes nothing: without a conversion the sparse branch is all there is."""
    query, key, value = (
        proxy(n).to(call.dtype) for n in (call.arguments.query, call.arguments.key, call.arguments.value)
    )
    out: Any = sparse_attention(query, key, value, None, spec, call.scale)
    return out  # type: ignore[no-any-return]
