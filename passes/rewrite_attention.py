"""Splice SALAD or block-sparse attention in the place of each chosen call.

    before                                     after
    a = scaled_dot_product_attention(q, k, v)  q, k, v = salad.take_rows(..., order, inverse)
    y = linear(a, w_o)                         lut, count = salad.select_blocks(pool_blocks(q), pool_blocks(k), ...)
                                               s = salad.block_sparse_attention(q, k, v, lut, count, ...)[0]
                                               s = salad.take_rows(s, inverse, order)
                                               l = salad.linear_output(q', *salad.linear_state(k', v, ...), ...)
                                               y = linear(s + gate * linear(l, proj_weight, proj_bias), w_o)

The subgraph is what definition/attention.py appends when it runs on `fx.Proxy` objects. Of a model that was never
converted only the softmax half is there, in the order that the tokens have.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.proxy import Proxy

from salad_compile.calls import packed_samples  # registers torch.ops.salad.require_equal_samples
from salad_compile.calls.adapters import AttentionArguments, key_padding, warn_of_dropout
from salad_compile.definition import branch_tensors
from salad_compile.definition.attention import salad_attention, sparse_attention
from salad_compile.definition.operands import Mapped, with_all_heads
from salad_compile.definition.spec import AttentionSpec
from salad_compile.definition.token_layout import segments
from salad_compile.passes.attention_call import CONVERTED, TRAINING_FREE, AttentionCall
from salad_compile.passes.context import Context, Counts, Pass
from salad_compile.passes.splicing import SplicingTracer

assert packed_samples

Wrap = Callable[[Any], Any]
"""Node -> proxy whose operations are appended to the graph."""


def _run(graph: fx.Graph, context: Context) -> Counts:
    counts = {CONVERTED: 0, TRAINING_FREE: 0}
    for call in context.calls[graph]:
        if call.status == CONVERTED:
            _splice(call, _define_salad)
        elif call.status == TRAINING_FREE:
            _splice(call, lambda call, proxy: _define_block_sparse(call, proxy, context.options.spec))
        else:
            continue
        counts[call.status] += 1
    return counts


PASS = Pass("rewrite_attention", _run)


def _splice(call: AttentionCall, definition: Callable[[AttentionCall, Wrap], Any]) -> None:
    graph = call.node.graph
    tracer = SplicingTracer(graph, call.node)
    with graph.inserting_before(call.node):
        out = definition(call, lambda node: Proxy(node, tracer))
    call.replace_with(out.node)


def _define_salad(call: AttentionCall, proxy: Wrap) -> Any:
    tagged = call.tagged
    if call.arguments.dropout_p:
        warn_of_dropout(call.arguments.dropout_p)
    text = call.site.args[1] if call.site is not None else None
    rows = proxy(tagged.gate_input)
    arguments, (query, key, value) = _operands(call, proxy)
    mapped = None
    if call.mapped is not None:
        mapped = Mapped(*(arguments.heads_first(proxy(node)) for node in call.mapped))
    out: Any = salad_attention(
        query,
        key,
        value,
        rows if call.sample is None else rows[call.sample : call.sample + 1],
        branch_tensors.from_flat([proxy(node) for node in tagged.tensors[1:]], call.spec),
        None if tagged.order is None else proxy(tagged.order),
        call.spec,
        scale=call.scale,
        dtype=call.dtype,
        key_mask=_key_mask(call, proxy, query),
        text=None if text is None else proxy(text),
        mapped=mapped,
    )
    return arguments.as_called(out)


def _define_block_sparse(call: AttentionCall, proxy: Wrap, spec: AttentionSpec) -> Any:
    """A projection that starts at zero contributes nothing: without a conversion the sparse branch is all there is."""
    arguments, operands = _operands(call, proxy)
    query, key, value = (operand.to(call.dtype) for operand in operands)
    shapes = call.shapes
    groups = int(shapes[0][1]) // int(shapes[1][1])
    key, value = with_all_heads(key, groups), with_all_heads(value, groups)
    where = segments("none", query.shape[2], query.shape[2])
    out: Any = sparse_attention(query, key, value, where, spec, call.scale, _key_mask(call, proxy, query))
    return arguments.as_called(out)


def _operands(call: AttentionCall, proxy: Wrap) -> tuple[AttentionArguments, list[Any]]:
    """The call's arguments as proxies, and query, key and value as (B, H, S, D)."""
    given = call.arguments
    batch = None if given.batch is None else proxy(given.batch)
    arguments = dataclasses.replace(given, batch=batch)
    query, key, value = (proxy(node) for node in (given.query, given.key, given.value))
    if given.batch is not None:
        key_batch = None if given.key_batch is None else proxy(given.key_batch)
        query = torch.ops.salad.require_equal_samples.default(query, batch, key_batch, key.shape[0])
    return arguments, [arguments.heads_first(operand) for operand in (query, key, value)]


def _key_mask(call: AttentionCall, proxy: Wrap, query: Any) -> Any:
    """Key padding as bool (B, S), or None."""
    kind = call.mask_kind
    return key_padding(proxy(call.arguments.attn_mask), kind, query.shape[0]) if kind else None
