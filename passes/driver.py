"""What happens to a graph, in order. Every nested graph (bodies of activation checkpoints) goes the same way.

    find attention      which calls are converted sites, which could be block-sparse, which stay dense and why
    rewrite             splice the SALAD or block-sparse subgraph in their place
    erase tags          remove the markers; a marker without a rewrite is an error

Nothing is decided by module names, nothing per layer is written into a graph, and no dead code is eliminated:
AOTAutograd cleans up.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from salad_compile.common.logs import logger
from salad_compile.config import AttentionSpec, BackendOptions, SaladConfig
from salad_compile.errors import ConfigError, SiteLostError
from salad_compile.passes.erase_tags import erase_tags
from salad_compile.passes.find_attention import CONVERTED, LEFT_DENSE, AttentionCall, find_attention, has_converted_tags
from salad_compile.passes.provenance import mark_of
from salad_compile.passes.rewrite import rewrite
from salad_compile.sites.graph_breaks import leave_uncompiled

_NOT_CONVERTED = "not a converted site of this converted model"


@dataclass(frozen=True)
class CallReport:
    """What became of one attention call: status is "salad", "block-sparse" or "dense" (then with a reason)."""

    module: str
    query_shape: str
    status: str
    reason: str


@dataclass(frozen=True)
class GraphReport:
    """What the passes did to one graph that Dynamo handed over.

    lost: a sentence for each converted site that would run dense. uncompiled: owners that run under the eager twin from
    now on, because the graph breaks inside them.
    """

    calls: tuple[CallReport, ...]
    lost: tuple[str, ...]
    seconds: float
    uncompiled: tuple[str, ...] = ()

    def count(self, status: str) -> int:
        """Attention calls with this status."""
        return sum(call.status == status for call in self.calls)


def run_passes(gm: fx.GraphModule, options: BackendOptions, inputs: Sequence[Any] = ()) -> GraphReport:
    """Rewrite a Dynamo graph and its nested graphs in place.

    Args:
        inputs: what Dynamo passed beside the graph, one for each placeholder, the parameters themselves among them.

    Raises:
        SiteLostError: a converted site would run dense and `options.strict` is set.
        ConfigError: the options contradict what a converted site carries.
    """
    start = time.perf_counter()
    logger.debug("before:\n%s", _Readable(gm))
    modules = list(_nested(gm))
    converted = any(has_converted_tags(module.graph) for module in modules)
    calls: list[CallReport] = []
    lost: list[str] = []
    uncompiled: list[str] = []
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    parameters = dict(zip(placeholders, inputs, strict=False))
    for module in modules:
        found = [_settle(call, converted, options) for call in find_attention(module.graph, options)]
        calls += [CallReport(c.module, c.shape, c.status, c.reason) for c in found]
        lost += [f"{call.module or 'the compiled module'}: {call.reason}" for call in found if call.lost]
        for call in found:
            rewrite(call, options)
        used = {call.tag for call in found if call.tag is not None}
        lost += erase_tags(module.graph, used, lambda site: _leave_uncompiled(site, parameters, uncompiled))
        module.graph.lint()
        module.recompile()
    report = GraphReport(tuple(calls), tuple(lost), time.perf_counter() - start, tuple(uncompiled))
    logger.info(
        "graph: %d attention calls, %d salad, %d block-sparse, %d dense, %d lost, %.3f s",
        *(len(calls), report.count(CONVERTED), report.count("block-sparse"), report.count(LEFT_DENSE), len(lost)),
        report.seconds,
    )
    logger.debug("after:\n%s", _Readable(gm))
    _complain(report, options)
    return report


def _leave_uncompiled(site: fx.Node, parameters: Mapping[fx.Node, Any], uncompiled: list[str]) -> bool:
    """Let a site run under the eager twin whose graph breaks between projection and attention."""
    mark = parameters.get(mark_of(site))  # type: ignore[call-overload]
    owners = [] if mark is None else leave_uncompiled(mark)
    if owners:
        logger.warning(
            "the graph breaks inside %s%s: these attention modules run uncompiled, as SALAD all the same. "
            'TORCH_LOGS="graph_breaks" says where it breaks.',
            *(owners[0] or "the model", f" and {len(owners) - 1} more of its class" if len(owners) > 1 else ""),
        )
    uncompiled += owners
    return bool(owners)


def _nested(gm: fx.GraphModule) -> Iterator[fx.GraphModule]:
    return (module for module in gm.modules() if isinstance(module, fx.GraphModule))


def _settle(call: AttentionCall, converted: bool, options: BackendOptions) -> AttentionCall:
    """In a converted model only what the conversion chose is rewritten, as the conversion says."""
    import dataclasses

    if call.status == CONVERTED:
        assert call.tag is not None
        _check_options(AttentionSpec.decode(str(call.tag.args[4])), options)
        return call
    if converted and call.status != LEFT_DENSE:
        return dataclasses.replace(call, status=LEFT_DENSE, reason=_NOT_CONVERTED)
    return call


def _check_options(spec: AttentionSpec, options: BackendOptions) -> None:
    asked = options.spec
    fields = {"sparsity": "permille", "pattern": "pattern", "query_block": "query_block", "key_block": "key_block"}
    for name, field in fields.items():
        if name in options.given and getattr(asked, field) != getattr(spec, field):
            raise ConfigError(
                f"options say {name}={getattr(options, name)!r}, but the model was converted with another value, and "
                f"uncompiled it would compute that one. Leave {name} out of options, or convert with "
                f"{SaladConfig.__name__}({name}={getattr(options, name)!r})."
            )


def _complain(report: GraphReport, options: BackendOptions) -> None:
    if not report.lost:
        return
    total = report.count(CONVERTED) + len(report.lost)
    message = (
        f"{len(report.lost)} of {total} converted sites of this graph would run dense: {'; '.join(report.lost)}.\n"
        "Known causes: an attention backend that calls its own kernels (set_attention_backend, "
        "DIFFUSERS_ATTN_BACKEND) or fuse_qkv_projections() after conversion: convert afterwards; DDP that cuts a "
        "whole-model graph into buckets: compile per block (compile_repeated_blocks) or set "
        "torch._dynamo.config.optimize_ddp = False; a graph break between projection and attention: leave that "
        "module uncompiled. options={'strict': False} turns this error into a warning."
    )
    if options.strict:
        raise SiteLostError(message)
    logger.warning(message)


class _Readable:
    """Prints a graph when a log record is formatted, and not before."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm

    def __str__(self) -> str:
        return "\n".join(module.print_readable(print_output=False) for module in _nested(self.gm))
