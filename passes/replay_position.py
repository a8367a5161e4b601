"""Run the model's own position encoding once more, on the features of query and key (map-then-rotate).

    before                                     after
    q = salad.tag(...)                         q = salad.tag(...); f = relu(q)
    r = q * cos                                r = q * cos;        r' = f * cos
    s = turn(q) * sin                          s = turn(q) * sin;  s' = turn(f) * sin
    rope = r + s                               rope = r + s;       rope' = r' + s'
    a = scaled_dot_product_attention(rope, ..) a = scaled_dot_product_attention(rope, ..)

The call notes q and rope' (and the same of the key) for the pass that replaces it. What was found (position/slice.py)
is copied node by node, each copy right behind its original: what it reads is then as the original found it, also where
the model writes in place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

# Private; what Dynamo and export record for each node (torch 2.11 and 2.13; tests/passes/test_splicing.py).
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.proxy import Proxy
from torch.utils._pytree import tree_map

from salad_compile.calls.adapters import is_attention
from salad_compile.definition.operands import Mapped
from salad_compile.passes.attention_call import CONVERTED, AttentionCall
from salad_compile.passes.context import Context, Counts, Pass
from salad_compile.passes.provenance import PROJECTIONS, example_value, projection_inputs
from salad_compile.passes.spare_memory import note_cheap
from salad_compile.passes.splicing import SplicingTracer
from salad_compile.position.flow import Flow, TensorInfo
from salad_compile.position.slice import Entry, PositionSlice, features, find_slice, told_of
from salad_compile.sites.markers import PROJECTED, SITES, TAGS


def _run(graph: fx.Graph, context: Context) -> Counts:
    calls = context.calls[graph] = [_replay(call) for call in context.calls[graph]]
    return {"replayed": sum(call.mapped is not None for call in calls)}


PASS = Pass("replay_position", _run)


def _replay(call: AttentionCall) -> AttentionCall:
    """A call with query and key before position noted, if its placement needs them and position mixes anything in.

    Raises:
        PositionReplayError: the position encoding of the model could not be determined.
    """
    if call.status != CONVERTED or not call.spec.maps_before_position or call.mapped is not None:
        return call
    operands = {"query": call.arguments.query, "key": call.arguments.key}
    found = find_slices(call)
    if all(slice_ is None for slice_ in found.values()):
        return call  # then the two placements are one
    replayer = _Replayer(call)
    with call.node.graph.inserting_before(call.node):
        (query, rotated_query), (key, rotated_key) = (replayer.run(found[role], operands[role]) for role in operands)
    return dataclasses.replace(call, mapped=Mapped(query, key, rotated_query, rotated_key))


def find_slices(call: AttentionCall) -> dict[str, PositionSlice | None]:
    """How the query and the key of a call got their position, by role.

    Raises:
        PositionReplayError: it could not be determined.
    """
    flow, found = _flow_before(call), {}
    for role, operand in (("query", call.arguments.query), ("key", call.arguments.key)):
        with told_of(call.module, role):
            found[role] = find_slice(flow, operand, int(_info(operand).shape[-1]))  # type: ignore[union-attr]
    return found


class _Replayer:
    def __init__(self, call: AttentionCall) -> None:
        self.graph, self.feature_map = call.node.graph, call.spec.feature_map
        self.tracer = SplicingTracer(self.graph, call.node)

    def run(self, found: PositionSlice | None, operand: fx.Node) -> tuple[Any, Any]:
        """An operand without position, and its features with it: two nodes."""
        if found is None:
            info, value = _info(operand), Proxy(operand, self.tracer)
            assert info is not None
            mapped: Any = features(value, info, int(info.shape[-1]), self.feature_map)
            return operand, mapped.node
        return found.replay(self._begin, self._copy)

    def _begin(self, entry: Entry) -> tuple[fx.Node, fx.Node]:
        behind = entry.at.next
        with self.graph.inserting_before(behind):
            value: Any = Proxy(entry.start.node, self.tracer)
            value = value.clone() if entry.overwritten else value
            plain, mapped = entry.begin(value, self.feature_map)
        made = behind.prev
        while made is not entry.at:
            note_cheap(made)
            made = made.prev
        return plain.node, mapped.node

    def _copy(self, node: fx.Node, known: Mapping[fx.Node, fx.Node]) -> fx.Node:
        with self.graph.inserting_before(node.next):
            copy = self.graph.node_copy(node, lambda argument: known.get(argument, argument))
        for again in (node, copy):
            note_cheap(again)
        for name in ("example_value", "val"):
            if name in copy.meta:
                copy.meta[name] = tree_map(_copy_value, copy.meta[name])
        return copy


def _copy_value(recorded: Any) -> Any:
    """A recorded value in memory of its own: a copy does not write where its original does."""
    if not isinstance(recorded, FakeTensor):
        return recorded
    with recorded.fake_mode, torch.no_grad():
        return torch.empty_strided(recorded.shape, recorded.stride(), dtype=recorded.dtype, device=recorded.device)


def _flow_before(call: AttentionCall) -> Flow:
    """What happens to the projections of a site up to its attention call."""
    known: dict[fx.Node, TensorInfo | None] = {}

    def info(node: fx.Node) -> TensorInfo | None:
        if node not in known:
            known[node] = _info(node)
        return known[node]

    flow = Flow(info, lambda node: is_attention(node.target))
    # keys and values of text that this module does not convert come from projections without a hook
    sources = TAGS | PROJECTED | (PROJECTIONS if call.spec.text == "prefix" else frozenset())
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
