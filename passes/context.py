"""A pass, and what the passes of one graph tell each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from salad_compile.config import BackendOptions
from salad_compile.passes.attention_call import AttentionCall
from salad_compile.passes.open_functions import APPLY
from salad_compile.passes.provenance import Tag
from salad_compile.sites.markers import SITES, TAGS

Counts = Mapping[str, int]
"""What a pass matched -> how often, in one graph."""


@dataclass
class Context:
    """What the passes know of one graph of Dynamo with its nested graphs, and what they find out.

    Attributes:
        options: of the backend.
        converted: whether the graph belongs to a converted model.
        parameters: placeholder -> what Dynamo passed for it, parameters among it.
        calls: graph -> its attention calls in order, as the passes so far have left them.
        lost: a sentence for each converted site that would run dense.
        uncompiled: owners that run under the eager twin from now on, because the graph breaks inside them.
        done: names of the passes that have run.
    """

    options: BackendOptions
    converted: bool = False
    parameters: Mapping[fx.Node, Any] = field(default_factory=dict)
    calls: dict[fx.Graph, list[AttentionCall]] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    uncompiled: list[str] = field(default_factory=list)
    done: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Pass:
    """One step over a graph. The driver calls `run` for each nested graph (bodies of checkpoints) as well.

    Attributes:
        name: in logs, reports and dumps.
        run: rewrites a graph in place, or the context alone, and returns what it matched. It must leave dead code where
            it is, erase only nodes that it matched, and give each new node the value that it computes (splicing.py).
    """

    name: str
    run: Callable[[fx.Graph, Context], Counts]


def graph_modules(gm: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """A graph module and those nested in it: bodies of checkpoints and other higher-order operators.

    Not those of autograd Functions, whose operations find_attention looks at where they are called.
    """
    modules = [module for module in gm.modules() if isinstance(module, fx.GraphModule)]
    inside = {
        id(module.get_submodule(str(body.target)))
        for module in modules
        for node in module.graph.nodes
        if node.target is APPLY
        for body in node.args[:2]
        if isinstance(body, fx.Node)
    }
    return (module for module in modules if id(module) not in inside)


def has_converted_tags(graph: fx.Graph) -> bool:
    """Whether the query projection of a converted site is in a graph."""
    return any(node.target in TAGS and Tag.of(node).is_converted for node in graph.nodes)


def has_sites(graph: fx.Graph) -> bool:
    """Whether a converted module is entered in a graph."""
    return any(node.target in SITES for node in graph.nodes)
