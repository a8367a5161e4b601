"""What convert would do, as a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from salad_compile.config import SaladConfig

if TYPE_CHECKING:
    from salad_compile.discovery.attention_site import AttentionSite
    from salad_compile.grid.rule import GridSource
from salad_compile.common.reports import Report, Row, site_path


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
