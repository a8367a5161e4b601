"""Which sites a user wants converted: names with wildcards."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from salad_compile.errors import SiteFilterError, did_you_mean

if TYPE_CHECKING:
    from salad_compile.discovery.discover import AttentionSite


def filtered(sites: list[AttentionSite], patterns: str | Sequence[str] | None) -> list[AttentionSite]:
    """The sites, of which those that the patterns leave out are no longer eligible, with that reason.

    Args:
        patterns: names with the wildcards of `fnmatch`; a leading "!" leaves out. Only "!" patterns: all others stay.

    Raises:
        SiteFilterError: a pattern matches no attention call.
    """
    if patterns is None:
        return sites
    given = [patterns] if isinstance(patterns, str) else list(patterns)
    wanted = [pattern for pattern in given if not pattern.startswith("!")]
    unwanted = [pattern.removeprefix("!") for pattern in given if pattern.startswith("!")]
    require_matches(sites, [*wanted, *unwanted], "sites")

    def chosen(site: AttentionSite) -> bool:
        return (not wanted or _matches(site.name, wanted)) and not _matches(site.name, unwanted)

    return [
        dataclasses.replace(site, eligible=False, reason=f"left out by sites={given}")
        if site.eligible and not chosen(site)
        else site
        for site in sites
    ]


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def require_matches(sites: list[AttentionSite], patterns: Iterable[str], option: str) -> None:
    """Raises SiteFilterError for a pattern of an option that matches no attention call."""
    names = list(dict.fromkeys(site.name for site in sites))
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise SiteFilterError(
                f"{option}={pattern!r} matches no attention call.{did_you_mean(pattern, names)} plan(model) lists "
                f"them: {', '.join(map(repr, names[:6]))}{', ...' if len(names) > 6 else ''}."
            )
