"""What a conversion added to a model, and what the backend made of it, as tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from salad_compile.common.reports import Report, Row, plural, site_path
from salad_compile.conversion.cost import SiteCost
from salad_compile.kernels.repairs import Repairs

if TYPE_CHECKING:
    from salad_compile.passes.report import GraphReport


# counting waits for the device, and inside a compiled graph nothing says which site it is
_UNMEASURED = (
    "Not measured: compiled runs are not counted. `salad_compile.explain(model, **inputs)` measures, and so does a "
    "forward without torch.compile."
)


@dataclass(frozen=True)
class SiteSummary:
    """One converted site: parameters, sparsity asked for and measured, FLOPs at the tokens of the conversion.

    measured_sparsity: in the first forward that ran uncompiled, or the last :func:`explain`; None before: runs of
        compiled graphs are not counted. engine: the one that computed block-sparse attention then.
    rotated_first: its linear branch sees query and key with position, because the position encoding cannot be run again
        on their features.
    """

    component: str
    name: str
    tokens: int
    heads: int
    head_dim: int
    branch_parameters: int
    lora_parameters: int
    trainable_parameters: int
    target_sparsity: float
    measured_sparsity: float | None
    engine: str | None
    cost: SiteCost
    dropped: bool = False
    rotated_first: bool = False


@dataclass(frozen=True, repr=False)
class Summary(Report):
    """What a conversion added to a model."""

    sites: Sequence[SiteSummary]
    base_parameters: int
    repairs: Mapping[str, Repairs] = field(default_factory=dict)
    """What the Gluon forward computed again, by device: all calls of this process, whatever the model."""

    title = "converted sites"
    columns = (
        "site",
        "tokens",
        "heads x dim",
        "sparsity",
        "measured",
        "engine",
        "gate + projection",
        "lora",
        "dense GFLOP",
        "SALAD GFLOP",
    )

    def rows(self) -> list[Row]:
        return [
            (
                site_path(site.component, site.name),
                str(site.tokens),
                f"{site.heads} x {site.head_dim}",
                f"{site.target_sparsity:.3f}",
                "not measured" if site.measured_sparsity is None else f"{site.measured_sparsity:.3f}",
                site.engine or "",
                "dropped" if site.dropped else f"{site.branch_parameters:,}",
                f"{site.lora_parameters:,}",
                f"{site.cost.dense / 1e9:,.1f}",
                f"{site.cost.salad / 1e9:,.1f}",
            )
            for site in self.sites
        ]

    @property
    def branch_parameters(self) -> int:
        """Gates and projections, all sites."""
        return sum(site.branch_parameters for site in self.sites)

    @property
    def lora_parameters(self) -> int:
        """Low-rank updates, all sites."""
        return sum(site.lora_parameters for site in self.sites)

    def notes(self) -> list[str]:
        share = 100 / self.base_parameters
        trainable = sum(site.trainable_parameters for site in self.sites)
        dense, salad = (sum(getattr(site.cost, name) for site in self.sites) for name in ("dense", "salad"))
        rotated = [site_path(site.component, site.name) for site in self.sites if site.rotated_first]
        return [
            f"{plural(len(self.sites), 'site')}; {self.branch_parameters:,} parameters added by gates and projections "
            f"({self.branch_parameters * share:+.2f} %), {self.lora_parameters:,} by LoRA "
            f"({self.lora_parameters * share:+.2f} %); {trainable:,} of them trainable.",
            f"Attention FLOPs per forward at the tokens of the conversion, computed: {dense / 1e12:.3f} T dense, "
            f"{salad / 1e12:.3f} T SALAD.",
            *([_UNMEASURED] if any(site.measured_sparsity is None for site in self.sites) else []),
            *(
                f"Rotated before the feature map: {plural(len(rotated), 'site')}, {name} first; `plan` says why."
                for name in rotated[:1]
            ),
            *(
                f"{device}: the Gluon forward computed {found.redone:,} of {found.tiles:,} tiles again "
                f"({100 * found.redone / max(found.tiles, 1):.3f} %), in {found.calls:,} calls of this process."
                for device, found in self.repairs.items()
            ),
        ]

    def to_dict(self) -> dict[str, Any]:
        return {
            "base_parameters": self.base_parameters,
            "branch_parameters": self.branch_parameters,
            "lora_parameters": self.lora_parameters,
            "repairs": {device: found._asdict() for device, found in self.repairs.items()},
            "sites": [dataclasses.asdict(site) for site in self.sites],
        }


@dataclass(frozen=True, repr=False)
class Explanation(Report):
    """What the backend rewrote, graph by graph, and how often sparse attention really ran."""

    graphs: Sequence[GraphReport]
    converted_sites: int
    executions: int
    measured_sparsity: float | None
    engines: Sequence[str]

    title = "graphs"
    columns = ("graph", "module", "query", "became", "reason")

    def rows(self) -> list[Row]:
        rows: list[Row] = []
        for number, graph in enumerate(self.graphs):
            rows += [(f"{number}", c.module, c.query_shape, c.status, c.reason) for c in graph.calls]
            rows += [(f"{number}", "", "", "lost", sentence) for sentence in graph.lost]
        return rows

    @property
    def complete(self) -> bool:
        """Whether every converted site ran as SALAD at least once."""
        return not any(graph.lost for graph in self.graphs) and self.executions >= self.converted_sites

    def notes(self) -> list[str]:
        from salad_compile.passes.report import add_up  # loads the passes, and `summary` needs none

        measured = ""
        if self.measured_sparsity is not None:
            measured = f", on engine {', '.join(self.engines)}, measured sparsity {self.measured_sparsity:.3f}"
        return [
            f"{len(self.graphs)} graphs; {self.converted_sites} converted sites; block-sparse attention ran "
            f"{self.executions} times in the forward{measured}.",
            f"Passes: {', '.join(map(str, add_up(self.graphs)))}.",
        ]

    def to_dict(self) -> dict[str, Any]:
        return {
            "graphs": [dataclasses.asdict(graph) for graph in self.graphs],
            "converted_sites": self.converted_sites,
            "executions": self.executions,
            "measured_sparsity": self.measured_sparsity,
            "engines": list(self.engines),
            "complete": self.complete,
        }
