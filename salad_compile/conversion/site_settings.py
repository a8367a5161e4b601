"""What a configuration says of single sites, checked against what the sites are: before anything is converted."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from salad_compile.conversion.site_filter import require_matches
from salad_compile.errors import PatternError

if TYPE_CHECKING:
    from salad_compile.config import SaladConfig
    from salad_compile.discovery.discover import AttentionSite


def apply_settings(sites: list[AttentionSite], config: SaladConfig) -> list[AttentionSite]:
    """The sites, of which the first `config.dense_layers` eligible ones are so no longer.

    Raises:
        SiteFilterError: a glob of `config.overrides` matches no site.
        PatternError: a site has a pattern that does not suit it.
    """
    require_matches(sites, config.overrides, "overrides")
    dense = {site.name for site in [site for site in sites if site.eligible][: config.dense_layers]}
    reason = f"one of the first {config.dense_layers}, which dense_layers keeps dense"
    settled = [
        dataclasses.replace(site, eligible=False, reason=reason) if site.eligible and site.name in dense else site
        for site in sites
    ]
    for site in settled:
        if site.eligible and config.of_site(site.name).pattern == "stswa":
            _require_windows(site, config.window)
    return settled


def _require_windows(site: AttentionSite, window: int | None) -> None:
    name = site.name or "the model"
    if not site.on_grid:
        raise PatternError(
            f'pattern "stswa" needs the token grid of the video, which is not known for {name!r}: pass grid=(T, H, W), '
            f'or convert with pattern "topk" (overrides={{{site.name!r}: {{"pattern": "topk"}}}} for this site alone).'
        )
    if site.mask is not None:
        raise PatternError(
            f'pattern "stswa" takes no mask, and {name!r} has one of shape {site.mask}: convert with pattern "topk".'
        )
    if window is not None and window >= site.video_tokens:
        raise PatternError(
            f"window={window} reaches beyond the {site.video_tokens} video tokens of {name!r}: choose a smaller one, "
            "or None, which follows the sparsity."
        )
