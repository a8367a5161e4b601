"""The passes in order, and what runs them over a graph and its nested graphs (bodies of activation checkpoints).

Nothing is decided by module names, nothing per layer is written into a graph, and no dead code is eliminated:
AOTAutograd cleans up.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import fx

from salad_compile.common.logs import logger
from salad_compile.config import BackendOptions
from salad_compile.kernels.listening import listen
from salad_compile.passes import (
    check_rows,
    erase_markers,
    find_attention,
    order_operands,
    pool_values,
    prepare_operands,
    replay_position,
    rewrite_attention,
    settle_calls,
    spare_memory,
)
from salad_compile.passes.attention_call import CONVERTED, LEFT_DENSE, TRAINING_FREE
from salad_compile.passes.context import Context, Pass, graph_modules, has_converted_tags
from salad_compile.passes.graph_dump import GraphDump, ReadableGraph
from salad_compile.passes.report import CallReport, GraphReport, PassReport, require_no_loss
from salad_compile.passes.whole_functions import blame_whole_functions

PASSES: tuple[Pass, ...] = (
    find_attention.PASS,
    settle_calls.PASS,
    check_rows.PASS,
    prepare_operands.PASS,
    replay_position.PASS,
    rewrite_attention.PASS,
    order_operands.PASS,
    pool_values.PASS,
    spare_memory.PASS,
    erase_markers.PASS,
)

Watcher = Callable[[fx.GraphModule, Context], None]
_watchers: list[Watcher] = []


@contextlib.contextmanager
def watch_passes(watcher: Watcher) -> Iterator[None]:
    """Meanwhile call `watcher` after each pass; `context.done[-1]` is its name. Tests check the graph's spec so."""
    with listen(_watchers, watcher):
        yield


def run_passes(gm: fx.GraphModule, options: BackendOptions, inputs: Sequence[Any] = ()) -> GraphReport:
    """Rewrite a Dynamo graph and its nested graphs in place.

    Args:
        inputs: what Dynamo passed beside the graph, one for each placeholder, the parameters themselves among them.

    Raises:
        SiteLostError: a converted site would run dense and `options.strict` is set.
        ConfigError: the options contradict what a converted site carries.
        PositionReplayError: the position encoding of a converted site could not be determined.
    """
    start = time.perf_counter()
    logger.debug("before:\n%s", ReadableGraph(gm))
    modules = list(graph_modules(gm))
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    context = Context(
        options,
        converted=any(has_converted_tags(module.graph) for module in modules),
        parameters=dict(zip(placeholders, inputs, strict=False)),
    )
    dump = GraphDump(options.dump_graphs, gm)
    passes = []
    for entry in PASSES:
        with blame_whole_functions([module.graph for module in modules]):
            passes.append(_run_pass(entry, modules, context))
        dump.write(entry.name)
        for watcher in _watchers:
            watcher(gm, context)
    dump.finish(passes)
    for module in modules:
        module.graph.lint()
        module.recompile()
    report = _report(context, modules, passes, time.perf_counter() - start)
    logger.debug("after:\n%s", ReadableGraph(gm))
    with blame_whole_functions([module.graph for module in modules]):
        require_no_loss(report, options.strict)
    return report


def _run_pass(entry: Pass, modules: Sequence[fx.GraphModule], context: Context) -> PassReport:
    start, counts = time.perf_counter(), Counter[str]()
    for module in modules:
        counts.update(entry.run(module.graph, context))
    context.done.append(entry.name)
    report = PassReport(entry.name, time.perf_counter() - start, dict(counts))
    logger.debug("pass: %s", report)
    return report


def _report(
    context: Context, modules: Sequence[fx.GraphModule], passes: Sequence[PassReport], seconds: float
) -> GraphReport:
    calls = [call for module in modules for call in context.calls.get(module.graph, ())]
    report = GraphReport(
        tuple(CallReport(call.module, call.shape, call.status, call.reason) for call in calls),
        tuple(context.lost),
        seconds,
        tuple(context.uncompiled),
        tuple(passes),
    )
    logger.info(
        "graph: %d attention calls, %d salad, %d block-sparse, %d dense, %d lost, %.3f s",
        len(calls),
        *(report.count(status) for status in (CONVERTED, TRAINING_FREE, LEFT_DENSE)),
        len(report.lost),
        seconds,
    )
    return report
