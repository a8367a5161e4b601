"""Mark what is cheap to compute again, so that no training step keeps it for its backward pass.

    before                                     after
    p = salad.prepare_operand(q, ...)          the same nodes, some with meta["recompute"]
    s = salad.block_sparse_attention(p[0], ..)

A compiler keeps whatever an operator that it does not know has written. Of an attention that is several times the
operands: with position and without, their features, the values in two orders, and what the linear branch adds. Each of
them takes a fraction of the time of attention, and comes out of the projections, which are kept anyway.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from salad_compile.passes.attention_call import CONVERTED
from salad_compile.passes.context import Context, Counts, Pass
from salad_compile.position.channel_rules import AXIS_MOVES, RESHAPES, SAME
from salad_compile.position.operations import operation

_OPERATORS = torch.ops.salad
_CHEAP = "salad_cheap"
"""In a node's meta: it is cheap, say other passes."""
_OF_OURS = frozenset(
    {
        _OPERATORS.prepare_operand,
        _OPERATORS.take_rows,
        _OPERATORS.take_rows_with_means,
        _OPERATORS.linear_output,
    }
)
_ELEMENTWISE = frozenset({"mul", "add", "addcmul", "sub", "div"})
_BEFORE_EVERY_REGION = 0


def _run(graph: fx.Graph, context: Context) -> Counts:
    counts = 0
    if context.converted and context.options.spare_memory:
        for node in graph.nodes:
            if _CHEAP in node.meta or getattr(node.target, "overloadpacket", node.target) in _OF_OURS:
                again = [node]
            elif _is_projection(node):
                again = [node, *_up_to_sum(node)]
            else:
                continue
            for each in again:
                _compute_again(each)
            counts += 1
        for call in context.calls[graph]:
            if call.status == CONVERTED and call.tag is not None:
                _spare_gate_input(call.tagged.gate_input)
    return {"computed again": counts}


PASS = Pass("spare_memory", _run)


def note_cheap(node: fx.Node) -> None:
    """Note that a node is cheaper to compute again than to keep."""
    node.meta[_CHEAP] = True


def _compute_again(node: fx.Node) -> None:
    """Let AOTAutograd's partitioner compute a node again in the backward pass, whatever that reads.

    Private: `recompute` and `ac_graph_id` in a node's meta, by which torch.utils.checkpoint tells the partitioner the
    same of a region. Dynamo's graph hands them on to what is traced from a node. Seen in torch 2.11 and 2.13;
    tests/passes/test_spare_memory.py counts what is kept.
    """
    node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
    node.meta["ac_graph_id"] = _BEFORE_EVERY_REGION


def _is_projection(node: fx.Node) -> bool:
    """Whether a node is the projection of the linear branch."""
    if node.op not in ("call_function", "call_method") or operation(node)[0] != "linear":
        return False
    value: Any = node.args[0]
    while isinstance(value, fx.Node) and value.target is not _OPERATORS.linear_output.default:
        if not _is_scaling(value):
            return False
        value = value.args[0] if value.args else None
    return isinstance(value, fx.Node)


def _up_to_sum(node: fx.Node) -> Iterator[fx.Node]:
    """What is done to the projection's result, up to the sum with sparse attention."""
    todo = [node]
    for each in todo:
        for user in each.users:
            if _is_scaling(user):
                todo.append(user)
                yield user
            elif user.op in ("call_function", "call_method") and operation(user)[0] == "add":
                yield user


def _spare_gate_input(node: Any) -> None:
    """The modulated norm that a block begins with is elementwise: its last step need not be kept for gate and LoRA."""
    while isinstance(node, fx.Node) and node.op in ("call_function", "call_method"):
        name, written = operation(node)
        if written or not (name in SAME or name in RESHAPES or name in _ELEMENTWISE):
            return
        _compute_again(node)
        node = None if name in _ELEMENTWISE else node.args[0]


def _is_scaling(node: fx.Node) -> bool:
    """Whether a node moves rows and channels, or multiplies them by a gate or a scale, and does nothing else."""
    if node.op not in ("call_function", "call_method"):
        return False
    name, written = operation(node)
    return not written and (name in ("mul", "pad") or name in SAME or name in RESHAPES or name in AXIS_MOVES)
