"""Let one kernel make of a projected query and key all that attention takes of them, where that is faster.

    before                                     after
    q = salad.tag(...)                         q = salad.tag(...)
    n = rms_norm(q, weight)                    p = salad.prepare_operand(q, [cos, sin], "interleaved", "rms", ...)
    r = n * cos                                a = scaled_dot_product_attention(p[0], ...)
    s = turn(n) * sin
    a = scaled_dot_product_attention(r + s, ..)

Position is not matched by how it is written: the slice that would be run again on the features (replay_position.py) is
run on symbols (position/channel_rules.py), and what comes out must be a rotation of channels in pairs. The call notes
p[1] and p[2], the rows without position and the rotated features, so that replay_position leaves it alone. What is not
known stays as it is, and the pass counts it with its reason. What the model made is dead then: AOTAutograd drops it.

With the option "auto" the pass leaves CPUs alone, where the plain operations of the engine are slower than what a
compiler makes of the model's own, and training, of which we have no timings.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import torch
from torch import fx
from torch.fx.proxy import Proxy

from salad_compile.common.logs import logger
from salad_compile.definition.operands import Mapped
from salad_compile.errors import PositionReplayError
from salad_compile.kernels.prepare.api import why_unsupported
from salad_compile.passes.attention_call import CONVERTED, AttentionCall, recorded_tensor
from salad_compile.passes.context import Context, Counts, Pass
from salad_compile.passes.provenance import example_value
from salad_compile.passes.replay_position import find_slices
from salad_compile.passes.splicing import SplicingTracer
from salad_compile.position.channel_forms import BATCH, TOKENS, Form, UnknownFormError, is_same
from salad_compile.position.channel_rules import Interpreter
from salad_compile.position.flow import TensorInfo
from salad_compile.position.norms import Norm, find_norm
from salad_compile.position.operations import data_arguments, operation
from salad_compile.position.rotation import Rotation, rotation_of
from salad_compile.position.slice import PositionSlice

_LAYOUTS = {"BHSD": (BATCH, None, TOKENS, None), "BSHD": (BATCH, TOKENS, None, None)}


def _run(graph: fx.Graph, context: Context) -> Counts:
    counts, asked = Counter[str](), context.options.prepare_operands
    if asked is not False:
        context.calls[graph] = [
            _prepare(call, counts) if asked is True or _is_faster(call) else call for call in context.calls[graph]
        ]
    return counts


PASS = Pass("prepare_operands", _run)


def _is_faster(call: AttentionCall) -> bool:
    """Whether the kernel is known to beat the compiler: on a GPU, where no gradient is wanted."""
    query = recorded_tensor(call.arguments.query)
    return query.is_cuda and not query.requires_grad


def _prepare(call: AttentionCall, counts: Counter[str]) -> AttentionCall:
    """A call with its query and key prepared, or as it is."""
    if call.status != CONVERTED or not call.spec.maps_before_position or not call.spec.linear_branch:
        return call
    try:
        slices = find_slices(call)
        forms = [_form_of(call, at, slices[role]) for at, role in enumerate(("query", "key"))]
    except PositionReplayError:
        return call  # replay_position says so
    except UnknownFormError as reason:
        counts[f"left: {reason}"] += 1
        logger.info("%s: its query and key are left to the compiler: %s", call.module, reason)
        return call
    counts["prepared"] += 2
    given, made = call.arguments, [_emit(call, form) for form in forms]
    (query, *of_query), (key, *of_key) = made
    mapped = Mapped(of_query[0], of_key[0], of_query[1], of_key[1])
    return dataclasses.replace(call, arguments=dataclasses.replace(given, query=query, key=key), mapped=mapped)


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """One operand: from which rows, with axes, and how."""

    rows: fx.Node
    axes: tuple[str | None, ...]
    heads: int
    norm: Norm | None
    rotation: Rotation


def _form_of(call: AttentionCall, at: int, found: PositionSlice | None) -> _Prepared:
    """How the query (0) or key (1) of a call is made. Raises UnknownFormError."""
    if found is None or len(found.entries) != 1 or call.arguments.layout not in _LAYOUTS:
        raise UnknownFormError("position is not in one stream of it alone")
    entry = found.entries[0]
    if found.scalings or entry.overwritten or any(entry.rewritten):
        raise UnknownFormError("it is scaled, or overwritten")
    norm, first, chain = find_norm(entry.start.node, example_value)
    rows = norm.rows if norm is not None else first
    batch, heads, tokens, head_dim = call.shapes[at]
    value = _tensor(rows)
    form = Form.of_channels(_axes(value.shape, batch, heads, tokens, head_dim), value.shape)
    run = Interpreter(example_value, {first: form}, value.dtype)
    run.run(chain)
    start = run.form(entry.start.node)
    layout = Interpreter(example_value, {entry.end.node: start}, value.dtype)
    run.run(found.mapped)
    layout.run(found.plain)
    operand, plain = found.operand, layout.form(found.operand)
    if plain.axes != _LAYOUTS[call.arguments.layout] or not _is_in_order(plain):
        raise UnknownFormError("its heads or channels are in another order than in attention")
    rotation = rotation_of(plain, run.form(operand), run.tables, heads, head_dim)
    made = _Prepared(rows, form.axes, heads, norm, rotation)
    if len({_tensor(node).dtype for node in (rows, first, operand)}) != 1:
        raise UnknownFormError("it changes its dtype on the way")
    _require_unshared(call, {*([norm.node] if norm is not None else []), *chain, *found.mapped, *found.plain})
    _require_readable(call, made)
    return made


def _is_in_order(plain: Form) -> bool:
    channels = plain.terms[..., 0, 0].flatten().tolist()
    return bool(channels == list(range(len(channels))))


def _axes(shape: Any, batch: Any, heads: Any, tokens: Any, head_dim: int) -> tuple[str | None, ...]:
    """Which dimensions of projected rows are batch and tokens."""
    known = {
        (BATCH, TOKENS, None): (batch, tokens, heads * head_dim),
        (BATCH, TOKENS, None, None): (batch, tokens, heads, head_dim),
        (BATCH, None, TOKENS, None): (batch, heads, tokens, head_dim),
    }
    fits = [axes for axes, sizes in known.items() if len(sizes) == len(shape) and all(map(is_same, shape, sizes))]
    if len(fits) != 1 or not isinstance(heads, int):
        raise UnknownFormError("its rows are no samples, tokens, heads and channels")
    return fits[0]


def _require_unshared(call: AttentionCall, between: set[fx.Node]) -> None:
    """What lies between the rows and attention is read by nothing else; or it would be computed twice."""
    for node in between:
        for user in node.users:
            if user in between or user is call.node:
                continue
            name = operation(user)[0] if user.op in ("call_function", "call_method") else user.op
            if user.op == "output" or node in data_arguments(user, name):
                raise UnknownFormError(f"{name} reads it as well")


def _require_readable(call: AttentionCall, made: _Prepared) -> None:
    """Nothing is overwritten before attention reads it, and an engine takes it."""
    norm, tables = made.norm, made.rotation.tables
    factors = () if norm is None else (norm.weight, norm.bias)
    read = [made.rows, *(view.table.node for view in tables), *(node for node in factors if node is not None)]
    held = {info.storage for info in map(TensorInfo.of, map(example_value, read)) if info is not None}
    node = call.node.prev
    while node is not made.rows:
        calls = node.op in ("call_function", "call_method")
        written = map(TensorInfo.of, map(example_value, operation(node)[1])) if calls else ()
        if any(info is not None and info.storage in held for info in written):
            raise UnknownFormError(f"{node} overwrites what it is made of")
        node = node.prev
    reason = why_unsupported(_heads_first(_tensor(made.rows), made), call.spec.feature_map)
    if reason:
        raise UnknownFormError(reason)


def _heads_first(rows: Any, made: _Prepared) -> Any:
    """(B, H, S, D) of projected rows. For tensors and for `fx.Proxy` objects."""
    if len(made.axes) == 3:
        rows = rows.unflatten(-1, (made.heads, -1))
    return rows if made.axes[2] == TOKENS else rows.transpose(1, 2)


def _tensor(node: fx.Node) -> torch.Tensor:
    value = example_value(node)
    if not isinstance(value, torch.Tensor):
        raise UnknownFormError(f"{node} has no recorded tensor")
    return value


def _emit(call: AttentionCall, made: _Prepared) -> list[Any]:
    """Nodes: the prepared operand, its rows without position and its rotated features, in the layout of the call."""
    graph, norm = call.node.graph, made.norm
    tracer = SplicingTracer(graph, call.node)

    def proxy(node: fx.Node | None) -> Any:
        return None if node is None else Proxy(node, tracer)

    with graph.inserting_before(call.node):
        rows = _heads_first(proxy(made.rows), made)
        tables = [view.of(proxy(view.table.node)) for view in made.rotation.tables]
        settings = ("none", "head", 0.0) if norm is None else (norm.kind, norm.over, norm.eps)
        affine = (None, None) if norm is None else (proxy(norm.weight), proxy(norm.bias))
        out: Any = torch.ops.salad.prepare_operand.default(
            rows, tables, made.rotation.pairs, *settings, call.spec.feature_map, 0, *affine
        )
        return [call.arguments.as_called(out[at]).node for at in range(3)]
