"""What compiling says, once: what becomes of a model that was never converted, and why nothing does if so."""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import fx

from salad_compile.backend.disabled_attention import disabled_attention
from salad_compile.backend.graph_break_reasons import Break, breaks_around
from salad_compile.calls.adapters import is_attention, unmet_targets
from salad_compile.common.logs import logger
from salad_compile.config import BackendOptions
from salad_compile.passes.attention_call import CONVERTED, TRAINING_FREE
from salad_compile.passes.context import graph_modules
from salad_compile.passes.find_attention import CROSS_ATTENTION, LEFT_BY_CONVERSION
from salad_compile.passes.provenance import PROJECTIONS
from salad_compile.passes.report import GraphReport
from salad_compile.passes.whole_functions import hint_at_whole_functions
from salad_compile.sites.converted_models import belongs_to_converted

_announced: set[str | Break] = set()
_told_disabled: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Models of which it was said that attention is disabled."""
_explained: list[str] = []
"""What graphs of the frame that is compiled say for themselves: that there is attention, or why there is none."""
_DISABLE = "torch.compiler.disable"
_LIKE_ATTENTION = re.compile("attention|attn|transformer_encoder")
_OF_TORCH = ("aten", "prims", "prim", "inductor", "higher_order", "salad")
_MENDS = {
    "fewer than min_tokens": "options={'min_tokens': ...} says from how many tokens on attention becomes sparse.",
    "dropout": "model.eval() or a dropout of 0 mends that.",
}
"""A part of a reason -> what helps."""
_APART = "in this graph"


def announce(report: GraphReport, gm: fx.GraphModule, inputs: Sequence[Any], options: BackendOptions) -> None:
    """Tell, once, what happens to a model that was never converted.

    Args:
        report: of the passes. gm: the graph after them. inputs: what Dynamo passed beside it, parameters included.
    """
    if report.calls:
        _explained.append("attention")
    if count := report.count(TRAINING_FREE):
        _say_once(
            f"this model was never converted: {count} self-attention calls of this graph became block-sparse at "
            f"sparsity {options.sparsity} without any training, which may change the quality of what it makes. "
            "options={'sparsity': ...} sets it (0 computes everything); salad_compile.convert(model) and fine-tuning "
            "adds what repairs the quality."
        )
    elif report.calls and not report.count(CONVERTED):
        reasons = dict.fromkeys(call.reason for call in report.calls)
        if set(reasons) <= {CROSS_ATTENTION, LEFT_BY_CONVERSION} and belongs_to_converted(inputs):
            return  # a graph of a converted model, of cross-attention alone say
        _announce_dense(list(reasons), gm)
    elif not report.calls and _has_projections(gm) and not belongs_to_converted(inputs):
        _announce_none(gm, inputs)


def announce_disabled(modules: Sequence[nn.Module]) -> None:
    """Tell, once, of attention that no graph holds because it is disabled, where no graph of the frame tells more.

    Args:
        modules: of which Dynamo has just compiled, or given up, a frame.
    """
    explained = bool(_explained)
    _explained.clear()
    if explained or not _met_disabled():
        return
    new = []
    for module in modules:
        if module in _told_disabled or not (found := _find_disabled(module)):
            continue
        if belongs_to_converted([*module.parameters(), *module.buffers()]):
            continue  # its sites run as SALAD between the graphs
        _told_disabled.add(module)
        new += [each for each in found if each not in _announced]
        _announced.update(found)
    if new:
        _say_once(
            f"nothing was rewritten: no attention call was seen in a graph. {'; '.join(dict.fromkeys(new))}: this "
            f"attention is under {_DISABLE} (or torch._dynamo.disable), where the graph breaks, and stays dense. Take "
            "that away, or salad_compile.convert(model): its sites run as SALAD all the same."
        )


def _find_disabled(module: nn.Module) -> list[str]:
    try:
        return disabled_attention(module)
    except Exception as error:  # of attributes of somebody's objects; a guess must not stop a compilation
        logger.debug("disabled attention of %s: %s: %s", type(module).__name__, type(error).__name__, error)
        return []


def _met_disabled() -> bool:
    """Whether Dynamo broke a graph at a disabled function.

    Private: its counters. Seen in torch 2.11 and 2.13; tests/salad_compile/backend/test_disabled_attention.py.
    """
    return any(_DISABLE in str(reason) for reason in torch._dynamo.utils.counters["graph_break"])


def _announce_dense(reasons: Sequence[str], gm: fx.GraphModule) -> None:
    """Say why all calls of a graph stay dense, and what helps."""
    apart = [reason for reason in reasons if _APART in reason]
    breaks = breaks_around(gm) if apart else []
    if breaks and len(apart) == len(reasons) and all(each in _announced for each in breaks):
        return  # the graph before this one said it
    _announced.update(breaks)
    mends = [mend for part, mend in _MENDS.items() if any(part in reason for reason in reasons)]
    if apart:
        mends.append(_tell_breaks(breaks) or "salad_compile.convert(model) follows values further than a graph does.")
    said = [f"nothing was rewritten in this graph, all attention stays dense: {'; '.join(reasons)}.", *mends]
    _say_once(" ".join(said))


def _has_projections(gm: fx.GraphModule) -> bool:
    nodes = (node for module in graph_modules(gm) for node in module.graph.nodes)
    return any(node.target in PROJECTIONS for node in nodes) or bool(_unknown(gm))


def _announce_none(gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
    """Say why a graph may hold no attention call; of graph breaks those that were not said before."""
    seen_none = "nothing was rewritten in this graph: no attention call was seen in it."
    if unknown := _unknown(gm):
        _explained.append("unknown")
        _say_once(
            f"{seen_none} It calls {', '.join(unknown)}, which may be attention that salad_compile does not know: "
            "salad_compile.attention_adapter teaches it; attention inside of torch's own layers is reached by "
            "salad_compile.convert(model), and in training mode."
        )
    elif _was_told_disabled(inputs):
        return
    elif breaks := breaks_around(gm):
        if new := [each for each in breaks if each not in _announced]:
            _explained.append("breaks")
            _announced.update(new)
            _say_once(f"{seen_none} {_tell_breaks(new)}")
    else:
        registered = "".join(f" attention_adapter was used for {names}, never met so far." for names in unmet_targets())
        _say_once(
            f"{seen_none} If the model has attention there, its function is not known: give it to "
            f"salad_compile.attention_adapter, and see what salad_compile.plan(model) finds.{registered}"
            + hint_at_whole_functions(module.graph for module in graph_modules(gm))
        )


def _was_told_disabled(inputs: Sequence[Any]) -> bool:
    known = {id(parameter) for module in _told_disabled for parameter in module.parameters()}
    return any(id(given) in known for given in inputs)


def _tell_breaks(breaks: Sequence[Break]) -> str:
    """Where graphs broke, and what helps; the empty string if none did."""
    if not breaks:
        return ""
    return (
        f"The graph breaks ({'; '.join(map(str, breaks))}): attention that runs between graphs, in functions under "
        "torch.compiler.disable for example, stays dense, and so does attention in another graph than its projections. "
        "Remove the break, or salad_compile.convert(model): its sites run as SALAD on either side of it."
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
