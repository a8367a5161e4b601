"""Erase the markers, and name every converted site that did not become SALAD: an erased tag is the silent no-op.

before                                     after
m = salad.site(mark, text)
q = linear(x, w_q)                         q = linear(x, w_q)
t = salad.tag(q, x, [...], order, spec)
k = linear(x, w_k)                         k = linear(x, w_k)
p = salad.projected(k)
y = f(t, p)                                y = f(q, k)
"""

from __future__ import annotations

from torch import fx

from salad_compile.common.logs import logger
from salad_compile.passes.context import Context, Counts, Pass
from salad_compile.passes.provenance import Tag, mark_of, module_path
from salad_compile.sites.graph_breaks import leave_uncompiled
from salad_compile.sites.markers import PROJECTED, SITES, TAGS


def _run(graph: fx.Graph, context: Context) -> Counts:
    tags, sites, projected = ([n for n in graph.nodes if n.target in kind] for kind in (TAGS, SITES, PROJECTED))
    used = {call.tag for call in context.calls[graph]}  # rewritten, or left dense and named
    converted = [tag for tag in tags if Tag.of(tag).is_converted]
    for tag in converted:
        if tag not in used:
            context.lost.append(_describe(tag, "its attention call is not in the same graph"))
    marks = [mark_of(tag) for tag in converted]
    for site in sites:
        if mark_of(site) not in marks and not (_is_last(site) and _leave_uncompiled(site, context)):
            context.lost.append(_describe(site, "its query projection did not run"))
    for node in [*tags, *projected]:
        out = node.args[0]
        assert isinstance(out, fx.Node)
        node.replace_all_uses_with(out)
        graph.erase_node(node)  # only what was matched: dead code elimination breaks pairs of side-effecting nodes
    for site in sites:
        graph.erase_node(site)
    return {"tags": len(tags), "sites": len(sites), "projected": len(projected)}


PASS = Pass("erase_markers", _run)


def _is_last(site: fx.Node) -> bool:
    """Whether nothing runs after the marker: then the graph broke inside its owner, before the query projection."""
    following = site.next
    while following.op == "placeholder" or following.op == "get_attr":
        following = following.next
    return following.op == "output"


def _leave_uncompiled(site: fx.Node, context: Context) -> bool:
    """Let a site run under the eager twin whose graph breaks between projection and attention."""
    mark = context.parameters.get(mark_of(site))  # type: ignore[call-overload]
    options = {"lowering": context.options.lowering, "inductor": dict(context.options.inductor)}
    owners = [] if mark is None else leave_uncompiled(mark, options)
    if owners:
        logger.warning(
            "the graph breaks inside %s%s: these attention modules run uncompiled, as SALAD all the same. "
            'TORCH_LOGS="graph_breaks" says where it breaks.',
            *(owners[0] or "the model", f" and {len(owners) - 1} more of its class" if len(owners) > 1 else ""),
        )
    context.uncompiled += owners
    return bool(owners)


def _describe(node: fx.Node, what: str) -> str:
    return f"{module_path(node) or 'the compiled module'}: {what}"
