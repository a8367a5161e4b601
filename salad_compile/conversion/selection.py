"""Which sites are converted, and whether their settings suit them: decided before anything is converted."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from salad_compile.common.checks import require
from salad_compile.definition import patterns
from salad_compile.definition.pattern import SiteFacts
from salad_compile.errors import PatternError, SiteFilterError, did_you_mean

if TYPE_CHECKING:
    from salad_compile.config import SaladConfig
    from salad_compile.discovery.attention_site import AttentionSite


def filter_sites(sites: list[AttentionSite], globs: str | Sequence[str] | None) -> list[AttentionSite]:
    """The sites, of which those that the globs leave out are no longer eligible, with that reason.

    Args:
        globs: names with the wildcards of `fnmatch`; a leading "!" leaves out. Only "!" globs: all others stay.

    Raises:
        SiteFilterError: a glob matches no attention call. ConfigError: they are no names.
    """
    if globs is None:
        return sites
    given = [globs] if isinstance(globs, str) else list(globs) if isinstance(globs, Iterable) else [globs]
    require(all(isinstance(glob, str) for glob in given), f"sites is a name or a list of names, got {globs!r:.80}.")
    wanted = [glob for glob in given if not glob.startswith("!")]
    unwanted = [glob.removeprefix("!") for glob in given if glob.startswith("!")]
    require_matches(sites, [*wanted, *unwanted], "sites")

    def chosen(site: AttentionSite) -> bool:
        return (not wanted or _matches(site.name, wanted)) and not _matches(site.name, unwanted)

    return [
        dataclasses.replace(site, eligible=False, reason=f"left out by sites={given}")
        if site.eligible and not chosen(site)
        else site
        for site in sites
    ]


def _matches(name: str, globs: Sequence[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


def require_matches(sites: list[AttentionSite], globs: Iterable[str], option: str) -> None:
    """Raises SiteFilterError for a glob of an option that matches no attention call."""
    names = list(dict.fromkeys(site.name for site in sites))
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            raise SiteFilterError(
                f"{option}={glob!r} matches no attention call.{did_you_mean(glob, names)} plan(model) lists "
                f"them: {', '.join(map(repr, names[:6]))}{', ...' if len(names) > 6 else ''}."
            )


def apply_settings(sites: list[AttentionSite], config: SaladConfig) -> list[AttentionSite]:
    """The sites, of which the first `config.dense_layers` eligible ones are no longer eligible.

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
        if site.eligible:
            facts = SiteFacts(site.name, site.on_grid, site.mask, site.video_tokens, config.window)
            if reason := patterns.find(config.of_site(site.name).pattern).misfit(facts):
                raise PatternError(reason)
    return settled
