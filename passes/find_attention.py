"""Find the attention calls of a graph, and what is to become of each. The graph stays as it is.

    before                                                 what is noted
    q = linear(x, w_q); tag = salad.tag(q, x, [...])
    a = scaled_dot_product_attention(rope(tag), k, v)      salad: the query comes from a tag
    c = scaled_dot_product_attention(q2, k_text, v_text)   dense: cross-attention
    m = softmax(q3 @ k3.mT / 8) @ v3                       block-sparse: self-attention of a model without tags

Operands of products that lie in an unusual order get permuted copies, which nothing reads if the call stays dense.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from salad_compile.calls import (
    flex_attention,  # register their nodes
    multihead,  # register their nodes
)
from salad_compile.calls.adapters import AttentionArguments, bind, dense_reason, is_attention
from salad_compile.calls.softmax_products import ManualAttention
from salad_compile.config import BackendOptions
from salad_compile.definition.spec import AttentionSpec
from salad_compile.grid.video_grid import order_error
from salad_compile.passes.attention_call import (
    CONVERTED,
    LEFT_DENSE,
    TRAINING_FREE,
    AttentionCall,
    kind_of_mask,
    operand_shapes,
    recorded_tensor,
)
from salad_compile.passes.context import Context, Counts, Pass
from salad_compile.passes.numbers import may_be_number, number_of
from salad_compile.passes.open_functions import function_body, open_function
from salad_compile.passes.provenance import (
    Tag,
    example_value,
    find_tag,
    is_dead,
    mark_of,
    module_path,
    projection_inputs,
)
from salad_compile.sites.markers import NO_ORDER, SITES, TAGS
from salad_compile.sites.outside_owner import twice_error

_REGISTERED = (flex_attention, multihead)

_IN_FUNCTION = "other attention in its autograd Function stays dense"
CROSS_ATTENTION, LEFT_BY_CONVERSION = "cross-attention", "the conversion left it dense"


def _run(graph: fx.Graph, context: Context) -> Counts:
    calls = context.calls[graph] = find_attention(graph, context.options, converted=context.converted)
    return Counter(call.status for call in calls)


PASS = Pass("find_attention", _run)


def find_attention(graph: fx.Graph, options: BackendOptions, *, converted: bool = False) -> list[AttentionCall]:
    """All attention calls of one graph, in order. Nothing is rewritten yet, but for Functions around calls to rewrite.

    Args:
        converted: whether the graph belongs to a converted model, where only converted sites are rewritten.
    """
    calls: list[AttentionCall] = []
    by_hand = ManualAttention({}, _rank, _permute, may_be_number, number_of)
    _require_own_forward(graph)
    for node in list(graph.nodes):
        body = function_body(node)
        opened = None if body is None else open_function(node, body)
        if opened is None:
            calls += _calls_of(node, by_hand, options, calls)
            continue
        inside: list[AttentionCall] = []
        for copied in opened.copied:
            inside += _calls_of(copied, by_hand, options, [*calls, *inside])
        rewritten = {CONVERTED} if converted else {CONVERTED, TRAINING_FREE}
        if inside and all(call.status in rewritten for call in inside):
            opened.take_over()
        else:
            opened.discard()
            inside = [
                dataclasses.replace(call, status=LEFT_DENSE, reason=call.reason or _IN_FUNCTION) for call in inside
            ]
        calls += inside
    return calls


def _require_own_forward(graph: fx.Graph) -> None:
    """Raises GridMismatchError for a converted site that runs while its model's forward does not.

    Raises SiteLostError where one forward of an owner runs the query projection twice.
    """
    entered = Counter(mark_of(node) for node in graph.nodes if node.target in SITES)
    ran: Counter[object] = Counter()
    for node in graph.nodes:
        if node.target not in TAGS or not Tag.of(node).is_converted:
            continue
        where = module_path(node) or "of this graph"
        if Tag.of(node).spec == NO_ORDER:
            raise order_error(where)
        ran[mark_of(node)] += 1
        if 0 < entered[mark_of(node)] < ran[mark_of(node)]:
            raise twice_error(where)


def _calls_of(
    node: fx.Node, by_hand: ManualAttention, options: BackendOptions, before: Sequence[AttentionCall]
) -> list[AttentionCall]:
    """The attention call that a node completes, if it completes one."""
    if node.op not in ("call_function", "call_method"):
        return []
    if node.op == "call_function" and is_attention(node.target):
        arguments = bind(node.target, node.args, node.kwargs, lambda operand: recorded_tensor(operand).dim())
        arguments = _with_number(arguments)
    else:
        with node.graph.inserting_before(node):
            found = by_hand.bind(node.target, node.args, node.kwargs)
        if found is None:
            by_hand.note(node.target, node.args, node.kwargs, node)
            return []
        arguments = found
    return [_classify(node, arguments, options, before)]


def _with_number(arguments: AttentionArguments) -> AttentionArguments:
    """With the scale as a number."""
    if not isinstance(arguments.scale, fx.Node) or arguments.reason:
        return arguments
    scale = number_of(arguments.scale)
    if scale is None:
        reason = "its scale is a tensor in the graph, as NumPy's numbers are, or known at run time only: give a float"
        return dataclasses.replace(arguments, reason=reason)
    return dataclasses.replace(arguments, scale=scale)


def _rank(value: Any) -> int:
    example = example_value(value) if isinstance(value, fx.Node) else None
    return example.dim() if isinstance(example, torch.Tensor) else 0


def _permute(node: fx.Node, axes: tuple[int, ...]) -> fx.Node:
    permuted = node.graph.call_method("permute", (node, axes))
    permuted.meta["example_value"] = recorded_tensor(node).permute(axes)
    return permuted


def _classify(
    node: fx.Node, arguments: AttentionArguments, options: BackendOptions, before: Sequence[AttentionCall]
) -> AttentionCall:
    tag = find_tag(arguments.query)
    if tag is None or not Tag.of(tag).is_converted:
        reason = LEFT_BY_CONVERSION if tag is not None else _dense_reason(arguments, options)
        reason = reason or _other_results(node, arguments)
        return AttentionCall(node, arguments, tag, LEFT_DENSE if reason else TRAINING_FREE, reason)
    spec = AttentionSpec.decode(Tag.of(tag).spec)
    shapes, kind = operand_shapes(arguments), kind_of_mask(arguments)
    # a mask, causality, ... that was not there at conversion
    reason = dense_reason(arguments, shapes, kind, square_is_padding=spec.square_mask)
    site = _site_of(tag)
    reason = reason or _other_results(node, arguments) or _without_text(spec, tag, site)
    sample = _sample(shapes[0], tag, spec, before)
    if sample is None and any(call.tag is tag for call in before):  # the site is the first call, uncompiled too
        return AttentionCall(node, arguments, None, LEFT_DENSE, "another attention call of a converted site's query")
    return AttentionCall(node, arguments, tag, LEFT_DENSE if reason else CONVERTED, reason, site, sample)


def _site_of(tag: fx.Node) -> fx.Node | None:
    """The entry marker of the owner of a tag: both mention its mark."""
    sites = (node for node in tag.graph.nodes if node.target in SITES)
    return next((site for site in sites if mark_of(site) is mark_of(tag)), None)


def _without_text(spec: AttentionSpec, tag: fx.Node, site: fx.Node | None) -> str:
    known = Tag.of(tag).order is not None or (site is not None and site.args[1] is not None)
    return "" if known or not spec.single else "nothing in this graph tells how much of it is text"


def _sample(
    query_shape: Sequence[Any], tag: fx.Node, spec: AttentionSpec, before: Sequence[AttentionCall]
) -> int | None:
    """Which sample a call is about that sees one, while its projection saw several."""
    gate_input = recorded_tensor(Tag.of(tag).gate_input)
    rows = math.prod(gate_input.shape[:-1])
    if spec.gate_axes or (spec.gates_every_query and statically_known_true(rows == query_shape[2])):
        return None
    several = gate_input.dim() == 3 and isinstance(gate_input.shape[0], int) and gate_input.shape[0] > 1
    if not several or not isinstance(query_shape[0], int) or query_shape[0] != 1:
        return None
    return sum(call.tag is tag for call in before)


def _other_results(node: fx.Node, arguments: AttentionArguments) -> str:
    """Why a call with several results cannot be replaced: more than the attention is read."""
    if arguments.output is None:
        return ""
    for user in node.users:
        if (user.target is not operator.getitem or user.args[1] != arguments.output) and not is_dead(user):
            return "other results of the call than the attention are read"
    return ""


def _dense_reason(arguments: AttentionArguments, options: BackendOptions) -> str:
    """Why an attention call of a model that was never converted stays dense, or the empty string."""
    if arguments.reason:
        return arguments.reason
    operands = (arguments.query, arguments.key, arguments.value)
    if not all(
        isinstance(operand, fx.Node) and isinstance(example_value(operand), torch.Tensor) for operand in operands
    ):
        return "its operands are no tensors of this graph"
    inputs = [projection_inputs(operand) for operand in operands]
    if any(len(sources) != 1 for sources in inputs):
        return "query, key and value do not each come from one projection in this graph"
    if not inputs[0] == inputs[1] == inputs[2]:
        return CROSS_ATTENTION
    if arguments.dropout_p:
        return f"it applies dropout (p={arguments.dropout_p})"
    shapes = operand_shapes(arguments)
    return dense_reason(arguments, shapes, kind_of_mask(arguments)) or _token_reason(shapes, options.min_tokens)


def _token_reason(shapes: Sequence[Sequence[Any]], min_tokens: int) -> str:
    queries, keys = shapes[0][2], shapes[1][2]
    if not statically_known_true(queries == keys):
        return f"{queries} queries but {keys} keys"
    try:
        # on a symbolic length this adds a guard: the graph is compiled once for each side of the threshold
        enough = bool(queries >= min_tokens)
    except Exception:  # an unbacked length, in whichever way this release says so
        return "its length is known at run time only"
    return "" if enough else f"{queries} tokens, fewer than min_tokens={min_tokens}"
