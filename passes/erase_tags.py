"""Erase the markers, and name every converted site that did not become SALAD: an erased tag is the silent no-op."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from salad_compile.passes.provenance import mark_of, module_path
from salad_compile.sites.markers import DENSE, PROJECTED, SITES, TAGS


def erase_tags(graph: fx.Graph, used: set[fx.Node], leave_uncompiled: Callable[[fx.Node], bool]) -> list[str]:
    """Remove all tags and site markers from a graph.

    Args:
        used: the tags whose attention call was rewritten or deliberately left dense.
        leave_uncompiled: asked for a site marker with which the graph ends, so that nothing of its owner is in it: can
            the owner still be made to run uncompiled?

    Returns:
        One sentence for each converted site of this graph that is lost.
    """
    tags = [node for node in graph.nodes if node.target in TAGS]
    sites = [node for node in graph.nodes if node.target in SITES]
    lost = [_describe(tag, "its attention call is not in the same graph") for tag in tags if _is_orphan(tag, used)]
    tagged = [mark_of(tag) for tag in tags if tag.args[4] != DENSE]
    for site in sites:
        if mark_of(site) not in tagged and not (_is_last(site) and leave_uncompiled(site)):
            lost.append(_describe(site, "its query projection did not run"))
    for tag in [*tags, *(node for node in graph.nodes if node.target in PROJECTED)]:
        out = tag.args[0]
        assert isinstance(out, fx.Node)
        tag.replace_all_uses_with(out)
        graph.erase_node(tag)  # only what was matched: dead code elimination breaks pairs of side-effecting nodes
    for site in sites:
        graph.erase_node(site)
    return lost


def _is_last(site: fx.Node) -> bool:
    """Whether nothing runs after the marker: then the graph broke inside its owner, before the query projection."""
    following = site.next
    while following.op == "placeholder" or following.op == "get_attr":
        following = following.next
    return following.op == "output"


def _is_orphan(tag: fx.Node, used: set[fx.Node]) -> bool:
    return tag.args[4] != DENSE and tag not in used


def _describe(node: fx.Node, what: str) -> str:
    return f"{module_path(node) or 'the compiled module'}: {what}"
