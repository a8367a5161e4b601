"""What convert would do, as a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from salad_compile.config import SaladConfig
from salad_compile.discovery.advice import advice

if TYPE_CHECKING:
    from salad_compile.discovery.attention_site import AttentionSite
    from salad_compile.grid.rule import GridSource
from salad_compile.common.reports import Report, Row, plural, site_path

NEARLY = 0.02  # so much less than the sparsity asked for is no reason for a warning


@dataclass(frozen=True)
class SiteForecast:
    """What a conversion adds to one site, and what the site computes then, at the tokens of the example forward.

    Attributes:
        sparsity: asked for. reachable: what whole blocks make of it.
        follows_sparsity: whether the pattern is as sparse as it is asked to be; False with a fixed window.
    """

    component: str
    name: str
    tokens: int
    branch_parameters: int
    lora_parameters: int
    dense_flops: int
    salad_flops: int
    sparsity: float
    reachable: float
    follows_sparsity: bool

    @property
    def falls_short(self) -> bool:
        """Whether the sparsity that was asked for cannot be reached."""
        return self.follows_sparsity and self.reachable < self.sparsity - NEARLY


@dataclass(frozen=True, repr=False)
class Plan(Report):
    """What `convert` would do: every attention call with its kind, size, fate and reason."""

    sites: Mapping[str, Sequence[AttentionSite]]  # component of a pipeline ("" for a model) -> sites
    config: SaladConfig
    grids: Mapping[str, GridSource | str] = dataclasses.field(default_factory=dict)  # or why it is not known
    forecasts: Sequence[SiteForecast] = ()  # of the eligible sites
    base_parameters: int = 0

    title = "attention sites"
    columns = ("site", "kind", "tokens", "heads x dim", "mask", "convert", "reason")

    @property
    def eligible(self) -> list[AttentionSite]:
        """The sites that would be converted."""
        return [site for sites in self.sites.values() for site in sites if site.eligible]

    def rows(self) -> list[Row]:
        return [
            (
                site_path(component, site.name),
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
        faults = [
            (site.name or "the model", *site.position_fault)
            for site in self.eligible
            if site.position_fault and self.config.of_site(site.name).spec.maps_before_position
        ]
        if faults:
            name, role, reason = faults[0]
            lines.append(
                f"{plural(len(faults), 'site')} would rotate before the feature map, {name} first: {role}: {reason}."
            )
        return [*lines, *self._forecast_notes()]

    def _forecast_notes(self) -> list[str]:
        found = self.forecasts
        if not found:
            return []
        branch, lora = (sum(getattr(entry, f"{name}_parameters") for entry in found) for name in ("branch", "lora"))
        dense, salad = (sum(getattr(entry, f"{name}_flops") for entry in found) for name in ("dense", "salad"))
        share = 100 / max(self.base_parameters, 1)
        reached = sorted({f"{entry.reachable:.3f}" for entry in found})
        lines = [
            f"Parameters that would be added: {branch:,} of gates and projections ({branch * share:+.2f} %), {lora:,} "
            f"of LoRA ({lora * share:+.2f} %).",
            f"Attention FLOPs of a forward of this size: {dense / 1e12:.3f} T dense, {salad / 1e12:.3f} T SALAD; "
            f"sparsity that its blocks reach: {' to '.join(dict.fromkeys((reached[0], reached[-1])))}.",
        ]
        short = [entry for entry in found if entry.falls_short]
        if short:
            worst = min(short, key=lambda entry: entry.reachable)
            lines.append(
                f"Warning: {plural(len(short), 'site')} cannot reach the sparsity {worst.sparsity:g} that is asked "
                f"for, only {worst.reachable:.3f}: at {worst.tokens:,} tokens there are too few blocks, or too many of "
                "them hold text. Smaller blocks (query_block, key_block) or a longer video mend it."
            )
        return [*lines, *advice(self.config, (entry.tokens for entry in found))]

    def to_dict(self) -> dict[str, Any]:
        return {
            "config": self.config.to_dict(),
            "grids": {name: str(grid) for name, grid in self.grids.items()},
            "base_parameters": self.base_parameters,
            "forecasts": [{**dataclasses.asdict(entry), "falls_short": entry.falls_short} for entry in self.forecasts],
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
