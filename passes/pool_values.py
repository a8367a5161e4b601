"""Let the move of values into the token order leave the means of their pools behind, where that is faster.

    before                                     after
    v = salad.take_rows(v, order, inverse)     v, m = salad.take_rows_with_means(v, order, inverse, 256, 0, end)
    m = salad.tail_means(v, 256, 0, end)       s = salad.attend_with_tail(q, k, v, ..., m, ...)[0]
    s = salad.attend_with_tail(q, k, v, ..., m, ...)[0]

A pass of its own over the values would take as long as a third of what compensation costs. With a key mask it stays:
the kernel leaves no row out. With the option "auto" the pass leaves CPUs alone, where a compiler fuses the move.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.proxy import Proxy

from salad_compile.passes.context import Context, Counts, Pass
from salad_compile.passes.provenance import example_value
from salad_compile.passes.splicing import SplicingTracer

_OPERATORS = torch.ops.salad


def _run(graph: fx.Graph, context: Context) -> Counts:
    asked, counts = context.options.prepare_operands, 0
    if asked is not False:
        for node in list(graph.nodes):
            if node.target is _OPERATORS.tail_means.default:
                counts += _join(node, everywhere=asked is True)
    return {"joined": counts}


PASS = Pass("pool_values", _run)


def _join(means: fx.Node, *, everywhere: bool) -> bool:
    """Whether the means of pools went into the move of their rows."""
    move, *pools = means.args[:4]  # and then a mask, and means that are known
    if not isinstance(move, fx.Node) or move.target is not _OPERATORS.take_rows.default:
        return False
    if any(given is not None for given in means.args[4:6]) or not (everywhere or _is_on_gpu(move)):
        return False
    number = {node: at for at, node in enumerate(move.graph.nodes)}
    if any(isinstance(bound, fx.Node) and number[bound] > number[move] for bound in pools):
        return False
    tracer = SplicingTracer(move.graph, move)

    def proxy(given: Any) -> Any:
        return Proxy(given, tracer) if isinstance(given, fx.Node) else given

    with move.graph.inserting_before(move):
        made: Any = _OPERATORS.take_rows_with_means.default(*map(proxy, (*move.args, *pools)))
        results = [made[at].node for at in range(2)]
    for old, new in zip((move, means), results, strict=True):
        old.replace_all_uses_with(new)
        old.graph.erase_node(old)
    return True


def _is_on_gpu(move: fx.Node) -> bool:
    recorded = example_value(move)
    return isinstance(recorded, torch.Tensor) and recorded.is_cuda
