"""What compiling says, once: what becomes of a model that was never converted, and why nothing does if so."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import fx

from salad_compile.calls.adapters import is_attention
from salad_compile.common.logs import logger
from salad_compile.config import BackendOptions
from salad_compile.passes.attention_call import CONVERTED, TRAINING_FREE
from salad_compile.passes.context import graph_modules
from salad_compile.passes.find_attention import CROSS_ATTENTION, LEFT_BY_CONVERSION
from salad_compile.passes.provenance import PROJECTIONS
from salad_compile.passes.report import GraphReport
from salad_compile.sites.graph_breaks import any_converted

_announced: set[str] = set()
_LIKE_ATTENTION = re.compile("attention|attn|transformer_encoder")
_OF_TORCH = ("aten", "prims", "prim", "inductor", "higher_order", "salad")


def announce(report: GraphReport, gm: fx.GraphModule, options: BackendOptions) -> None:
    """Tell, once, what happens to a model that was never converted.

    Args:
        report: of the passes. gm: the graph after them.
    """
    if count := report.count(TRAINING_FREE):
        _say_once(
            f"this model was never converted: {count} self-attention calls of this graph became block-sparse at "
            f"sparsity {options.sparsity} without any training, which may change the quality of what it makes. "
            "options={'sparsity': ...} sets it (0 computes everything); salad_compile.convert(model) and fine-tuning "
            "adds what repairs the quality."
        )
    elif report.calls and not report.count(CONVERTED):
        reasons = dict.fromkeys(call.reason for call in report.calls)
        if any_converted() and set(reasons) <= {CROSS_ATTENTION, LEFT_BY_CONVERSION}:
            return  # a graph of a converted model, of cross-attention alone say
        broken = f" {_breaks()}" if any("in this graph" in reason for reason in reasons) else ""
        _say_once(f"nothing was rewritten in this graph, all attention stays dense: {'; '.join(reasons)}.{broken}")
    elif not report.calls and not any_converted() and _has_projections(gm):
        _say_once(f"nothing was rewritten in this graph: no attention call was seen in it. {_why_none(gm)}")


def _has_projections(gm: fx.GraphModule) -> bool:
    nodes = (node for module in graph_modules(gm) for node in module.graph.nodes)
    return any(node.target in PROJECTIONS for node in nodes) or bool(_unknown(gm))


def _why_none(gm: fx.GraphModule) -> str:
    if unknown := _unknown(gm):
        return (
            f"It calls {', '.join(unknown)}, which may be attention that salad_compile does not know: "
            "salad_compile.attention_adapter teaches it; attention inside of torch's own layers is reached by "
            "salad_compile.convert(model), and in training mode."
        )
    if broken := _breaks():
        return broken
    return (
        "If the model has attention there, its function is not known: give it to salad_compile.attention_adapter, and "
        "see what salad_compile.plan(model) finds."
    )


def _breaks() -> str:
    """Where graphs broke, and what helps; the empty string if none did."""
    # Not documented: reasons by which Dynamo broke graphs, most recent last. Seen in torch 2.11 and 2.13;
    # tests/salad_compile/backend/test_announcements.py fails when it moves.
    reasons = [str(reason).strip().splitlines()[0] for reason in torch._dynamo.utils.counters["graph_break"]]
    if not reasons:
        return ""
    return (
        f"The graph breaks ({'; '.join(dict.fromkeys(reasons[-3:]))}): attention that runs between graphs, in "
        "functions under torch.compiler.disable for example, stays dense, and so does attention in another graph than "
        'its projections. TORCH_LOGS="graph_breaks" says where. Remove the break, or salad_compile.convert(model): '
        "its sites run as SALAD on either side of it."
    )


def _unknown(gm: fx.GraphModule) -> list[str]:
    """Names of operators and functions in a graph that may be attention."""
    nodes: Iterable[fx.Node] = (node for module in graph_modules(gm) for node in module.graph.nodes)
    found: dict[str, None] = {}
    for node in nodes:
        if node.op != "call_function" or is_attention(node.target):
            continue
        name = str(node.target) if isinstance(node.target, _OPERATORS) else getattr(node.target, "__name__", "")
        foreign = isinstance(node.target, _OPERATORS) and name.split(".")[0] not in _OF_TORCH
        if foreign or (_LIKE_ATTENTION.search(name) and not name.startswith("salad")):
            found[name] = None
    return list(found)


_OPERATORS = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)


def _say_once(message: str) -> None:
    if message not in _announced:
        _announced.add(message)
        logger.warning(message)
