"""See that each gate meets its own token: the rows of the tag are the tokens of the call. The graph stays as it is.

before                                         after
x -> salad.tag -> view, permute, ... -> call   the same, or the call is dense and lost, with the reason

Discovery has seen the same of the example inputs; other sizes, or another batch, may move tokens in another way.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

# Private; seen in torch 2.11 and 2.13 (tests/salad_compile/position/test_private_names.py).
from torch._subclasses.fake_tensor import is_fake, unset_fake_temporarily
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from salad_compile.passes.attention_call import CONVERTED, LEFT_DENSE, AttentionCall
from salad_compile.passes.context import Context, Counts, Pass
from salad_compile.passes.provenance import PROJECTIONS, example_value
from salad_compile.position.row_reader import Values
from salad_compile.position.rows import RowTracker
from salad_compile.position.run_rows import like
from salad_compile.position.shadows import share_memory
from salad_compile.sites.markers import TAGS
from salad_compile.sites.row_check import gate_fault


def _run(graph: fx.Graph, context: Context) -> Counts:
    calls = context.calls[graph]
    checked = [call for call in calls if call.status == CONVERTED]
    if not checked:
        return {}
    try:
        reasons = _faults(graph, checked, context.parameters)
    except _UnsizedError:  # there is nothing to compare
        return {}
    context.calls[graph] = [
        dataclasses.replace(call, status=LEFT_DENSE, reason=reasons[call.node]) if reasons.get(call.node) else call
        for call in calls
    ]
    context.lost += [
        f"{call.module or 'the compiled module'}: {reasons[call.node]}" for call in checked if reasons[call.node]
    ]
    return {"checked": len(checked)}


_NUMBERS = (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)
# From which models make the indices of an order of tokens.
_INDICES = frozenset(
    {torch.arange, torch.argsort, torch.flip, torch.roll, "argsort", "flip", "roll", "long", "flatten"}
)


class _UnsizedError(Exception):
    """A size that only the run knows."""


PASS = Pass("check_rows", _run)


def _faults(graph: fx.Graph, calls: Sequence[AttentionCall], parameters: Mapping[fx.Node, Any]) -> dict[fx.Node, str]:
    """Call -> why its gates would belong to other tokens, or the empty string."""
    tracker = RowTracker({}, Values(_shape, lambda node: _constant(node, parameters), _is_data, _share, _stand_in))
    first: dict[fx.Node, int] = {}
    pending = {call.node: call for call in calls}
    reasons: dict[fx.Node, str] = {}
    for node in graph.nodes:
        if not pending.keys() - reasons.keys():
            break
        if node.target in TAGS:
            first[node] = tracker.add_source(node)
        elif node in pending:
            reasons[node] = _fault(pending[node], tracker, first)
        elif node.op in ("call_function", "call_method") and node.target not in PROJECTIONS:
            _note(node, tracker)
    return reasons


@dataclasses.dataclass(frozen=True)
class _Part:
    """One of the tensors that a node answers."""

    node: fx.Node
    at: int


def _note(node: fx.Node, tracker: RowTracker) -> None:
    value = example_value(node)
    if node.target is operator.getitem and isinstance(example_value(node.args[0]), (tuple, list)):  # type: ignore[arg-type]
        part = _Part(*node.args)  # type: ignore[arg-type]
        if part in tracker.table:
            tracker.table[node] = tracker.table[part]
        return
    args, kwargs = fx.node.map_aggregate((node.args, dict(node.kwargs)), _plain)
    several = isinstance(value, (tuple, list)) and not isinstance(value, torch.Size)
    out = [_Part(node, at) for at, _ in enumerate(value)] if several else node  # type: ignore[arg-type]
    tracker.note(node.target, args, kwargs, out)


def _plain(value: Any) -> Any:
    """Numbers for the nodes that stand for some; other nodes as they are."""
    if not isinstance(value, fx.Node):
        return value
    known = example_value(value)
    return fx.node.map_aggregate(known, _number) if isinstance(known, (*_NUMBERS, torch.Size)) else value


def _number(size: Any) -> Any:
    """A size as it is in the call for which this is compiled."""
    if isinstance(size, torch.SymInt):
        if free_unbacked_symbols(size):
            raise _UnsizedError
        return size.node.hint
    return size


def _shape(value: Any) -> tuple[int, ...] | None:
    """Of what stands for a tensor; None for anything else."""
    known = _known(value) if isinstance(value, (_Part, fx.Node)) else None
    return tuple(_number(size) for size in known.shape) if isinstance(known, torch.Tensor) else None


def _known(value: Any) -> Any:
    """The example of what stands for a tensor."""
    return example_value(value.node)[value.at] if isinstance(value, _Part) else example_value(value)  # type: ignore[index]


def _is_data(value: Any) -> bool:
    known = _known(value)
    return isinstance(known, torch.Tensor) and (known.is_floating_point() or known.is_complex())


def _share(one: Any, other: Any) -> bool:
    return share_memory(_known(one), _known(other))


def _stand_in(value: Any) -> torch.Tensor | None:
    """Random numbers in the shape of what stands for a tensor."""
    shape = _shape(value)
    return None if shape is None else like(_known(value), shape)


def _constant(value: Any, parameters: Mapping[fx.Node, Any]) -> torch.Tensor | None:
    """What a node holds that reads nothing but constants, as a tensor on the CPU; None where that is not known."""
    known = parameters.get(value) if value.op == "placeholder" else None
    if value.op == "get_attr":
        known = value.graph.owning_module.get_buffer(value.target)
    elif value.target in _INDICES:
        given = [_constant(node, parameters) for node in value.all_input_nodes if _shape(node) is not None]
        if all(tensor is not None for tensor in given):
            tensors = iter(given)
            args, kwargs = fx.node.map_aggregate(
                (value.args, {k: v for k, v in value.kwargs.items() if k != "device"}),
                lambda arg: next(tensors) if isinstance(arg, fx.Node) and _shape(arg) is not None else _plain(arg),
            )
            with unset_fake_temporarily():
                known = (
                    getattr(args[0], value.target)(*args[1:], **kwargs)
                    if value.op == "call_method"
                    else value.target(*args, **kwargs)
                )
    if not isinstance(known, torch.Tensor) or is_fake(known) or known.device.type == "meta":
        return None
    return known.detach().cpu()


def _fault(call: AttentionCall, tracker: RowTracker, first: Mapping[fx.Node, int]) -> str:
    assert call.tag is not None
    arguments = call.arguments
    packed = _shape(arguments.batch)
    if packed is not None:  # how many samples there are is in its size
        arguments = dataclasses.replace(arguments, batch=torch.empty(packed))
    rows = tracker.rows(arguments.query, arguments.heads_first)
    return gate_fault(rows, first[call.tag], (_shape(call.tag) or ())[:-1], call.sample, call.spec)
