"""The model's own position encoding, run once more in a graph on the features of a query and a key (map-then-rotate).

What was found (position/slice.py) is copied node by node, each copy right behind its original: what it reads is then as
the original found it, also where the model writes in place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

# Private; what Dynamo and export record for each node (torch 2.11 and 2.13; tests/passes/test_splicing.py).
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.proxy import Proxy
from torch.utils._pytree import tree_map

from salad_compile.calls.adapters import is_attention
from salad_compile.config import AttentionSpec
from salad_compile.definition.attention import Mapped
from salad_compile.passes.find_attention import AttentionCall
from salad_compile.passes.provenance import PROJECTIONS, example_value, projection_inputs
from salad_compile.position.flow import Flow, TensorInfo
from salad_compile.position.slice import Entry, PositionSlice, features, find_slice, told_of
from salad_compile.sites.markers import PROJECTED, SITES, TAGS


def replay_position(call: AttentionCall, spec: AttentionSpec, proxy: Callable[[fx.Node], Proxy]) -> Mapped | None:
    """Query and key of a converted call before position, and their features with it, as proxies in the call's layout.

    Args:
        proxy: wraps a node; what is called on it is appended where the graph inserts.

    Returns:
        None where no position mixes in between projection and call: then the two placements are one.

    Raises:
        PositionReplayError: it cannot be told what the position encoding is.
    """
    flow = _flow_before(call, spec)
    operands = {"query": call.arguments.query, "key": call.arguments.key}
    found = {}
    for role, operand in operands.items():
        with told_of(call.module, role):
            found[role] = find_slice(flow, operand, int(_info(operand).shape[-1]))  # type: ignore[union-attr]
    if all(slice_ is None for slice_ in found.values()):
        return None
    replayer = _Replayer(call.node.graph, proxy, spec.feature_map)
    (query, rotated_query), (key, rotated_key) = (replayer.run(found[role], operands[role]) for role in operands)
    return Mapped(query, key, rotated_query, rotated_key)


class _Replayer:
    def __init__(self, graph: fx.Graph, proxy: Callable[[fx.Node], Proxy], feature_map: str) -> None:
        self.graph, self.proxy, self.feature_map = graph, proxy, feature_map

    def run(self, found: PositionSlice | None, operand: fx.Node) -> tuple[Any, Any]:
        """An operand without position, and its features with it."""
        value: Any = self.proxy(operand)
        if found is None:
            info = _info(operand)
            assert info is not None
            return value, features(value, info, int(info.shape[-1]), self.feature_map)
        plain, rotated = found.replay(self._begin, self._again)
        return self.proxy(plain), self.proxy(rotated)

    def _begin(self, entry: Entry) -> tuple[fx.Node, fx.Node]:
        with self.graph.inserting_before(entry.at.next):
            value: Any = self.proxy(entry.start.node)
            value = value.clone() if entry.overwritten else value
            plain, mapped = entry.begin(value, self.feature_map)
        return plain.node, mapped.node

    def _again(self, node: fx.Node, known: Mapping[fx.Node, fx.Node]) -> fx.Node:
        with self.graph.inserting_before(node.next):
            copy = self.graph.node_copy(node, lambda argument: known.get(argument, argument))
        for name in ("example_value", "val"):
            if name in copy.meta:
                copy.meta[name] = tree_map(_unshared, copy.meta[name])
        return copy


def _unshared(recorded: Any) -> Any:
    """A recorded value in memory of its own: a copy does not write where its original does."""
    if not isinstance(recorded, FakeTensor):
        return recorded
    with recorded.fake_mode, torch.no_grad():
        return torch.empty_strided(recorded.shape, recorded.stride(), dtype=recorded.dtype, device=recorded.device)


def _flow_before(call: AttentionCall, spec: AttentionSpec) -> Flow:
    """What happens to the projections of a site up to its attention call."""
    known: dict[fx.Node, TensorInfo | None] = {}

    def info(node: fx.Node) -> TensorInfo | None:
        if node not in known:
            known[node] = _info(node)
        return known[node]

    flow = Flow(info, lambda node: is_attention(node.target))
    # keys and values of text that this module does not convert come from projections without a hook
    sources = TAGS | PROJECTED | (PROJECTIONS if spec.text == "prefix" else frozenset())
    node = call.site if call.site is not None else next(iter(call.node.graph.nodes))
    while node is not call.node:
        if node.target in sources:
            flow.add_source(node)
            for projected in projection_inputs(node.all_input_nodes[0]):
                flow.add_input(projected)
        elif node.op in ("call_function", "call_method") and node.target not in SITES:
            flow.add(node)
        node = node.next
    return flow


def _info(node: fx.Node) -> TensorInfo | None:
    return TensorInfo.of(example_value(node))
