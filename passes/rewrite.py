"""AttentionCall -> SALAD subgraph, by running the one definition of attention.py on `fx.Proxy` objects."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch.fx.proxy import Proxy

from salad_compile.calls.adapters import AttentionArguments, key_padding, warn_of_dropout
from salad_compile.config import AttentionSpec, BackendOptions
from salad_compile.definition.attention import Mapped, salad_attention, sparse_attention, with_all_heads
from salad_compile.definition.branch_tensors import BranchTensors
from salad_compile.definition.token_layout import segments
from salad_compile.passes.find_attention import CONVERTED, TRAINING_FREE, AttentionCall
from salad_compile.passes.replay_position import replay_position
from salad_compile.passes.splicing import SplicingTracer


def rewrite(call: AttentionCall, options: BackendOptions) -> None:
    """Splice the subgraph of a converted or a training-free call in the place of its attention node."""
    if call.status == CONVERTED:
        _splice(call, _converted)
    elif call.status == TRAINING_FREE:
        _splice(call, lambda call, proxy: _training_free(call, proxy, options.spec))


def _splice(call: AttentionCall, definition: Any) -> None:
    graph = call.node.graph
    tracer = SplicingTracer(graph, call.node)
    with graph.inserting_before(call.node):
        out = definition(call, lambda node: Proxy(node, tracer))
    call.replace_with(out.node)


def _converted(call: AttentionCall, proxy: Any) -> Proxy:
    assert call.tag is not None
    _, gate_input, tensors, order, encoded = call.tag.args
    assert isinstance(tensors, (list, tuple))
    spec = AttentionSpec.decode(str(encoded))
    if call.arguments.dropout_p:
        warn_of_dropout(call.arguments.dropout_p)
    text = call.site.args[1] if call.site is not None else None
    rows = proxy(gate_input)
    arguments, (query, key, value) = _operands(call, proxy)
    out: Any = salad_attention(
        query,
        key,
        value,
        rows if call.sample is None else rows[call.sample : call.sample + 1],
        BranchTensors.from_flat([proxy(node) for node in tensors[1:]], spec),
        None if order is None else proxy(order),
        spec,
        scale=call.scale,
        dtype=call.dtype,
        key_mask=_key_mask(call, proxy, query),
        text=None if text is None else proxy(text),
        mapped=_mapped(call, arguments, proxy, spec),
    )
    return arguments.as_called(out)  # type: ignore[no-any-return]


def _mapped(call: AttentionCall, arguments: AttentionArguments, proxy: Any, spec: AttentionSpec) -> Mapped | None:
    """Query and key before position, for the placement that needs them."""
    mapped = replay_position(call, spec, proxy) if spec.maps_before_position else None
    return None if mapped is None else Mapped(*(arguments.heads_first(operand) for operand in mapped))


def _training_free(call: AttentionCall, proxy: Any, spec: AttentionSpec) -> Proxy:
    """A projection that starts at zero contributes nothing: without a conversion the sparse branch is all there is."""
    arguments, operands = _operands(call, proxy)
    query, key, value = (operand.to(call.dtype) for operand in operands)
    shapes = call.shapes
    groups = int(shapes[0][1]) // int(shapes[1][1])
    key, value = with_all_heads(key, groups), with_all_heads(value, groups)
    where = segments("none", query.shape[2], query.shape[2])
    out: Any = sparse_attention(query, key, value, where, spec, call.scale, _key_mask(call, proxy, query))
    return arguments.as_called(out)  # type: ignore[no-any-return]


def _operands(call: AttentionCall, proxy: Any) -> tuple[AttentionArguments, list[Any]]:
    """The call's arguments as proxies, and query, key and value as (B, H, S, D)."""
    given = call.arguments
    batch = None if given.batch is None else proxy(given.batch)
    arguments = dataclasses.replace(given, batch=batch)
    return arguments, [arguments.heads_first(proxy(node)) for node in (given.query, given.key, given.value)]


def _key_mask(call: AttentionCall, proxy: Any, query: Any) -> Any:
    kind = call.mask_kind
    return key_padding(proxy(call.arguments.attn_mask), kind, query.shape[0]) if kind else None
