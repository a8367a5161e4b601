"""What users see: plan, summary and explanation, each as table, dictionary, JSON and Markdown."""

from __future__ import annotations

import dataclasses
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .config import SaladConfig
from .cost import SiteCost

if TYPE_CHECKING:
    from .discovery import AttentionSite
    from .geometry import GridSource
    from .passes.driver import GraphReport

Row = tuple[str, ...]


class Report(ABC):
    """A titled table that also prints as JSON and Markdown."""

    title: str
    columns: Row

    @abstractmethod
    def rows(self) -> list[Row]:
        """Cells as text; rows that differ only in a number of the first cell are folded when shown."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Everything, unfolded, as JSON can hold it."""

    def notes(self) -> list[str]:
        """Lines below the table."""
        return []

    def to_json(self, *, indent: int | None = 2) -> str:
        """:meth:`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=indent)

    def to_markdown(self) -> str:
        """A Markdown table with its notes."""
        lines = [self.columns, tuple("---" for _ in self.columns), *fold(self.rows())]
        table = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
        return "\n".join([f"**{self.title}**", "", *table, "", *self.notes()])

    def to_text(self, *, width: int | None = None) -> str:
        """The table for a terminal; wide enough for all cells unless `width` says otherwise."""
        from io import StringIO

        from rich.console import Console

        buffer = StringIO()
        Console(file=buffer, width=width or 160, color_system=None).print(self.__rich__())
        return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())

    def __rich__(self) -> Any:
        from rich import box
        from rich.console import Group
        from rich.table import Table

        table = Table(title=self.title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for column in self.columns:
            table.add_column(column, overflow="fold")
        for row in fold(self.rows()):
            table.add_row(*row)
        return Group(table, *self.notes())

    def __str__(self) -> str:
        return self.to_text()


def fold(rows: Sequence[Row]) -> list[Row]:
    """Merge rows that are equal but for one consecutive number in the first cell: blocks.{0..39}.attn1."""
    groups: dict[tuple[str, Row], list[Row]] = {}
    for row in rows:
        groups.setdefault((re.sub(r"\d+", "#", row[0]), row[1:]), []).append(row)
    folded: list[Row] = []
    for (pattern, rest), members in groups.items():
        name = _folded_name(pattern, [[int(n) for n in re.findall(r"\d+", member[0])] for member in members])
        folded += [(name, *rest)] if name else members
    return folded


def _folded_name(pattern: str, numbers: list[list[int]]) -> str | None:
    """`pattern` with its numbers filled in, if just one of them varies and runs without a gap."""
    columns = list(zip(*numbers, strict=True))
    varying = [column for column in columns if len(set(column)) > 1]
    if len(varying) != 1 or list(varying[0]) != list(range(varying[0][0], varying[0][0] + len(numbers))):
        return None
    texts = [f"{{{c[0]}..{c[-1]}}}" if c is varying[0] else str(c[0]) for c in columns]
    for text in texts:
        pattern = pattern.replace("#", text, 1)
    return pattern


def _path(component: str, name: str) -> str:
    return ".".join(part for part in (component, name) if part) or "(model)"


@dataclass(frozen=True)
class Plan(Report):
    """What `convert` would do: every attention call with its kind, size, fate and reason."""

    sites: Mapping[str, Sequence[AttentionSite]]  # component of a pipeline ("" for a model) -> sites
    config: SaladConfig
    grids: Mapping[str, GridSource | str] = dataclasses.field(default_factory=dict)  # or why it is not known

    title = "attention sites"
    columns = ("site", "kind", "tokens", "heads x dim", "mask", "convert", "reason")

    @property
    def eligible(self) -> list[AttentionSite]:
        """The sites that would be converted."""
        return [site for sites in self.sites.values() for site in sites if site.eligible]

    def rows(self) -> list[Row]:
        return [
            (
                _path(component, site.name),
                site.kind,
                _tokens(site),
                f"{site.heads} x {site.head_dim}",
                str(site.mask) if site.mask else ("causal" if site.causal else ""),
                "yes" if site.eligible else "no",
                site.reason,
            )
            for component, sites in self.sites.items()
            for site in sites
        ]

    def notes(self) -> list[str]:
        total = sum(len(sites) for sites in self.sites.values())
        lines = [
            f"{len(self.eligible)} of {total} attention calls are eligible at min_tokens={self.config.min_tokens}."
        ]
        for component, grid in self.grids.items():
            of = f" of {component}" if component else ""
            known = grid if isinstance(grid, str) else ""
            lines.append(f"token grid{of}: {f'not known, flat order ({known})' if known else grid}")
        faults = [site.position_fault for site in self.eligible if site.position_fault]
        if faults:
            lines.append(f"{len(faults)} sites would rotate before the feature map: {': '.join(faults[0])}.")
        return lines

    def to_dict(self) -> dict[str, Any]:
        return {
            "config": self.config.to_dict(),
            "grids": {name: str(grid) for name, grid in self.grids.items()},
            "sites": [
                {"component": component, **dataclasses.asdict(site)}
                for component, sites in self.sites.items()
                for site in sites
            ],
        }


def _tokens(site: AttentionSite) -> str:
    if site.text == "none":
        return f"{site.query_tokens}" if site.kind == "self" else f"{site.query_tokens} x {site.key_tokens}"
    parts = [f"{site.video_tokens}", f"{site.text_tokens} text"]
    return " + ".join(parts if site.text == "after" else parts[::-1])


@dataclass(frozen=True)
class SiteSummary:
    """One converted site: parameters, sparsity asked for and measured, FLOPs at the tokens of the conversion."""

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
    cost: SiteCost
    dropped: bool = False


@dataclass(frozen=True)
class Summary(Report):
    """What a conversion added to a model."""

    sites: Sequence[SiteSummary]
    base_parameters: int

    title = "converted sites"
    columns = (
        "site",
        "tokens",
        "heads x dim",
        "sparsity",
        "measured",
        "gate + projection",
        "lora",
        "dense GFLOP",
        "SALAD GFLOP",
    )

    def rows(self) -> list[Row]:
        return [
            (
                _path(site.component, site.name),
                str(site.tokens),
                f"{site.heads} x {site.head_dim}",
                f"{site.target_sparsity:.3f}",
                "not run yet" if site.measured_sparsity is None else f"{site.measured_sparsity:.3f}",
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
        return [
            f"{len(self.sites)} sites; {self.branch_parameters:,} parameters added by gates and projections "
            f"({self.branch_parameters * share:+.2f} %), {self.lora_parameters:,} by LoRA "
            f"({self.lora_parameters * share:+.2f} %); {trainable:,} of them trainable.",
            f"Attention FLOPs per forward at the tokens of the conversion, computed: {dense / 1e12:.3f} T dense, "
            f"{salad / 1e12:.3f} T SALAD.",
        ]

    def to_dict(self) -> dict[str, Any]:
        return {
            "base_parameters": self.base_parameters,
            "branch_parameters": self.branch_parameters,
            "lora_parameters": self.lora_parameters,
            "sites": [dataclasses.asdict(site) for site in self.sites],
        }


@dataclass(frozen=True)
class Explanation(Report):
    """What the backend rewrote, graph by graph, and how often sparse attention really ran."""

    graphs: Sequence[GraphReport]
    converted_sites: int
    executions: int
    measured_sparsity: float | None

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
        measured = "" if self.measured_sparsity is None else f", measured sparsity {self.measured_sparsity:.3f}"
        return [
            f"{len(self.graphs)} graphs; {self.converted_sites} converted sites; block-sparse attention ran "
            f"{self.executions} times in the forward{measured}."
        ]

    def to_dict(self) -> dict[str, Any]:
        return {
            "graphs": [dataclasses.asdict(graph) for graph in self.graphs],
            "converted_sites": self.converted_sites,
            "executions": self.executions,
            "measured_sparsity": self.measured_sparsity,
            "complete": self.complete,
        }
