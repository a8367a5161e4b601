"""Let the kernel that prepares an operand write it in token order, with the means of its blocks.

    before                                     after
    p = salad.prepare_operand(q, ...)          p = salad.prepare_operand(q, ..., order, inverse), block 128
    r = salad.take_rows(p[0], order, inverse)  a = salad.select_blocks(p[3], ...)
    m = salad.pool_blocks(r.detach(), 128)     s = salad.block_sparse_attention(p[0], ...)
    a = salad.select_blocks(m, ...)
    s = salad.block_sparse_attention(r, ...)

Only where nothing else reads the rows in the order that they had. With a key mask the means stay operations of their
own: the kernel leaves no row out.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from salad_compile.kernels.preparation import Preparation
from salad_compile.passes.context import Context, Counts, Pass
from salad_compile.passes.provenance import example_value
from salad_compile.position.operations import SIZES, operation

_OPERATORS = torch.ops.salad
_ROTATED, _MEANS = 0, 3  # results of a preparation
_ARGUMENTS = ("x", *Preparation._fields)


def _run(graph: fx.Graph, context: Context) -> Counts:
    counts = {"ordered": 0, "pooled": 0}
    if context.options.prepare_operands is not False:
        for node in list(graph.nodes):
            if node.target is _OPERATORS.take_rows.default:
                counts["ordered"] += _order(node)
            elif node.target is _OPERATORS.pool_blocks.default:
                counts["pooled"] += _pool(node)
    return counts


PASS = Pass("order_operands", _run)


def _order(move: fx.Node) -> bool:
    """Whether a move of rows went into the kernel that made them."""
    made = _rows_of(move.args[0], move)
    if made is None or _given(made).get("order") is not None:
        return False
    order, inverse = move.args[1:]
    number = {node: at for at, node in enumerate(move.graph.nodes)}
    late: list[fx.Node] = []
    for permutation in (order, inverse):
        assert isinstance(permutation, fx.Node)
        if number[permutation] > number[made]:
            if any(number[argument] > number[made] for argument in permutation.all_input_nodes):
                return False
            late.append(permutation)
    for permutation in late:
        made.prepend(permutation)
    _give(made, order=order, inverse=inverse)
    move.replace_all_uses_with(move.args[0])  # type: ignore[arg-type]
    move.graph.erase_node(move)
    return True


def _pool(pool: fx.Node) -> bool:
    """Whether the means of blocks went into the kernel that made their rows."""
    rows, block, *mask = pool.args
    detached = rows if isinstance(rows, fx.Node) and operation(rows)[0] == "detach" else None
    made = None if detached is None else _rows_of(detached.args[0], None)
    if made is None or any(given is not None for given in mask) or _given(made)["block"]:
        return False
    _give(made, block=block)
    recorded = example_value(made)
    assert isinstance(recorded, tuple)
    name = "example_value" if "example_value" in made.meta else "val"
    made.meta[name] = (*recorded[:_MEANS], example_value(pool))
    with pool.graph.inserting_before(pool):
        means = pool.graph.call_function(operator.getitem, (made, _MEANS))
    means.meta.update(pool.meta)
    pool.replace_all_uses_with(means)
    pool.graph.erase_node(pool)
    return True


def _rows_of(value: Any, reader: fx.Node | None) -> fx.Node | None:
    """The preparation whose rotated rows a value is, maybe through views that cancel out.

    Args:
        reader: the one node that may read the rows; None if others may too.
    """
    turned = False
    while isinstance(value, fx.Node):
        if reader is not None and any(user is not reader and operation(user)[0] not in SIZES for user in value.users):
            return None
        if value.target is operator.getitem:
            made, result = value.args
            prepares = isinstance(made, fx.Node) and made.target is _OPERATORS.prepare_operand.default
            return made if prepares and result == _ROTATED and not turned else None  # type: ignore[return-value]
        name, source = operation(value)[0] if value.op != "placeholder" else "", value.args[:1]
        if name == "transpose" and value.args[1:] == (1, 2):
            turned = not turned
        elif name != "to" or not _same_kind(value, source[0]):
            return None
        reader, value = value if reader is not None else None, source[0]
    return None


def _same_kind(value: fx.Node, source: Any) -> bool:
    """Whether a cast changes nothing."""
    ours, theirs = example_value(value), example_value(source)
    if not isinstance(ours, torch.Tensor) or not isinstance(theirs, torch.Tensor):
        return False
    return (ours.dtype, ours.device) == (theirs.dtype, theirs.device)


def _given(made: fx.Node) -> dict[str, Any]:
    """The arguments of a preparation by name; the last ones may be left out."""
    return dict(zip(_ARGUMENTS, made.args, strict=False))


def _give(made: fx.Node, **values: Any) -> None:
    made.args = tuple((dict.fromkeys(_ARGUMENTS) | _given(made) | values).values())
