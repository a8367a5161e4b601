"""Sites that cannot be told apart: a projection that runs twice, or that several sites have, or one module for two."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from salad_compile.discovery.probe import Call, Frame, Probe

if TYPE_CHECKING:
    from salad_compile.discovery.attention_site import AttentionSite


def runs_fault(call: Call, owner: str, queries: Sequence[str], probe: Probe) -> str:
    """Why the gate's tokens are not those of the one run of a query projection, or the empty string.

    Args:
        owner: name of the module whose forward holds projections and call. queries: names of the query projections.
    """
    frame = next((frame for frame in reversed(call.stack) if frame.name == owner), None)
    for name in queries[:1]:  # the video's
        stacks = [stack for ran, stack in probe.runs if ran == name]
        inside = sum(frame in stack for stack in stacks)
        if inside > 1:
            return (
                f"its query projection {name!r} runs {inside} times in one forward of {owner or 'the model'!r}: which "
                "run a gate belongs to cannot be told"
            )
        if any(all(frame.name != owner for frame in stack) for stack in stacks):
            return f"its query projection {name!r} also runs outside of {owner!r}, where its attention would be dense"
    return _read_again(call, frame, probe)


def _read_again(call: Call, frame: Frame | None, probe: Probe) -> str:
    """Why the call is not the one that attends with its query, but for calls for one sample after another."""
    if not call.made_by[0]:
        return ""
    gate_input = call.made_by[0][0].gate_input
    if call.shapes[0][0] == 1 and gate_input.dim() > 2 and gate_input.shape[0] > 1:
        return ""
    readers = [other for other in probe.calls if frame in other.stack and _nodes(other, 0) == _nodes(call, 0)]
    # the very same query is no part of it
    parts = [other for other in readers if other.arguments.query is not call.arguments.query]
    parts = [other for other in parts if _nodes(other, 1) == _nodes(call, 1)]
    if parts:
        return (
            f"{len(parts) + 1} attention calls of one forward read its query and key, heads or tokens in parts for "
            "example: only one call for all of them can be converted"
        )
    return "another attention call reads its query before it does" if readers[:1] != [call] else ""


def _nodes(call: Call, operand: int) -> list[Any]:
    """What identifies the runs of the projections of the query (0), key (1) or value (2)."""
    return [projection.node for projection in call.made_by[operand]]


def reject_shared(sites: list[AttentionSite]) -> list[AttentionSite]:
    """The sites, of which those that share their module or a projection with another one are no longer eligible.

    What reads a result and is a projection to another site's query, key or value is no output projection.
    """
    taken = {name for site in sites for name in _inputs(site)}
    sites = [_without_outs(site, taken) for site in sites]
    owners = Counter(site.name for site in sites if site.eligible)
    holders: dict[str, dict[str, None]] = {}
    for site in sites:
        for name in _projections(site) if site.eligible else ():
            holders.setdefault(name, {})[site.name] = None

    def fault(site: AttentionSite) -> str:
        if owners[site.name] > 1:
            return (
                f"{owners[site.name]} self-attention calls share the forward of {site.name or 'the model'!r}: "
                "put each into a module of its own"
            )
        for name in _projections(site):
            others = [other for other in holders[name] if other != site.name]
            if others:
                return f"the projection {name!r} is also one of {others[0] or 'the model'!r}: give each site its own"
        return ""

    faults = [fault(site) if site.eligible else "" for site in sites]
    return [
        dataclasses.replace(site, eligible=False, reason=reason) if reason else site
        for site, reason in zip(sites, faults, strict=True)
    ]


def _inputs(site: AttentionSite) -> tuple[str, ...]:
    return (*site.query, *site.key, *site.value)


def _without_outs(site: AttentionSite, taken: set[str]) -> AttentionSite:
    if site.out in taken or site.text_out in taken:
        keep = [None if name in taken else name for name in (site.out, site.text_out)]
        return dataclasses.replace(site, out=keep[0], text_out=keep[1])
    return site


def _projections(site: AttentionSite) -> list[str]:
    names = (*_inputs(site), site.out, site.text_out)
    return list(dict.fromkeys(name for name in names if name is not None))
