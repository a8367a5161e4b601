"""What the passes did to one graph, and the error if a converted site was lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from salad_compile.common.logs import logger
from salad_compile.errors import SiteLostError
from salad_compile.passes.attention_call import CONVERTED
from salad_compile.passes.context import Counts


@dataclass(frozen=True)
class CallReport:
    """What became of one attention call: status is "salad", "block-sparse" or "dense" (then with a reason)."""

    module: str
    query_shape: str
    status: str
    reason: str


@dataclass(frozen=True)
class PassReport:
    """What one pass matched in a graph and its nested graphs, and how long it took."""

    name: str
    seconds: float
    counts: Counts

    def __str__(self) -> str:
        matched = ", ".join(f"{count} {what}" for what, count in self.counts.items() if count)
        return f"{self.name} {self.seconds * 1e3:.1f} ms ({matched or 'nothing matched'})"


@dataclass(frozen=True)
class GraphReport:
    """What the passes did to one graph that Dynamo handed over.

    lost: a sentence for each converted site that would run dense. uncompiled: owners that run under the eager twin from
    now on, because the graph breaks inside them. passes: in the order in which they ran; `seconds` counts all of it.
    """

    calls: tuple[CallReport, ...]
    lost: tuple[str, ...]
    seconds: float
    uncompiled: tuple[str, ...] = ()
    passes: tuple[PassReport, ...] = ()

    def count(self, status: str) -> int:
        """Attention calls with this status."""
        return sum(call.status == status for call in self.calls)


def add_up(graphs: Iterable[GraphReport]) -> list[PassReport]:
    """One report for each pass, of all graphs together."""
    found: dict[str, list[PassReport]] = {}
    for report in (report for graph in graphs for report in graph.passes):
        found.setdefault(report.name, []).append(report)
    sums = []
    for name, reports in found.items():
        counts = Counter[str]()
        for report in reports:
            counts.update(report.counts)
        sums.append(PassReport(name, sum(report.seconds for report in reports), dict(counts)))
    return sums


def require_no_loss(report: GraphReport, strict: bool) -> None:
    """Raises SiteLostError if a converted site was lost; not `strict`: warns."""
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
    if strict:
        raise SiteLostError(message)
    logger.warning(message)
