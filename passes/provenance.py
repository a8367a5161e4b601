"""Walking rules: from a value in a Dynamo graph back to the tag or the projection that made it; what a tag carries.

Dynamo's graphs are not functional: Wan's rotation is `empty_like` and two `setitem`s, so writers of a value are parents
too. Shapes and scalars are not: following sizes made one attention call resolve to seventeen projections.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import fx

from salad_compile.calls.adapters import is_attention
from salad_compile.sites.markers import DENSE, TAGS

PROJECTIONS = frozenset({F.linear, torch.ops.aten.linear.default})
# Methods whose further tensor arguments lend a shape or a dtype, and no data.
_SELF_ONLY = frozenset({"type_as", "view_as", "expand_as", "reshape_as", "to"})
_NO_DATA = (int, float, bool, torch.Size, torch.SymInt, torch.SymFloat, torch.SymBool)


def example_value(node: fx.Node) -> object:
    """The fake tensor or number that Dynamo (example_value) or export (val) recorded for a node."""
    return node.meta.get("example_value", node.meta.get("val"))


def module_path(node: fx.Node) -> str:
    """Where a node came from, for messages only: the path is relative to the frame, and the compile root has none."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    path = re.sub(r"\.?__dict__\['_modules'\]|\._modules", "", path)
    path = re.sub(r"\['?(\w+)'?\]", r".\1", path)
    path = re.sub(r"^L\.(self|fn|mod)\.?", "", path)
    return re.sub(r"^bound\.0\.?", "", path)  # `video_grid.RootForward` holds the root


class Tag(NamedTuple):
    """The arguments of a call of :func:`salad_compile.sites.markers.tag`: nodes, and the spec as text.

    Attributes:
        out, gate_input: output and input of the query projection. tensors: the site's mark, then its tensors.
        order: of the video's tokens, or None.
        spec: encoded :class:`AttentionSpec`, or the word for a site that has none.
    """

    out: fx.Node
    gate_input: fx.Node
    tensors: Sequence[fx.Node]
    order: fx.Node | None
    spec: str

    @classmethod
    def of(cls, node: fx.Node) -> Tag:
        """What a node carries whose target is among `TAGS`."""
        return cls(*node.args)  # type: ignore[arg-type]

    @property
    def is_converted(self) -> bool:
        """Whether its site is to become SALAD; attention that the conversion left dense has a tag too."""
        return self.spec != DENSE


def mark_of(node: fx.Node) -> object:
    """The graph input by which the tag and the entry marker of a site know each other (`BranchParameters.mark`)."""
    given = Tag.of(node).tensors if node.target in TAGS else node.args[0]
    mark = given[0] if isinstance(given, (list, tuple)) else given
    # export takes a cast to the dtype that a tensor has for that tensor
    while isinstance(mark, fx.Node) and mark.op in ("call_function", "call_method"):
        mark = mark.args[0]
    return mark


def data_parents(node: fx.Node) -> list[fx.Node]:
    """The nodes whose data went into this one, in-place writers included."""
    if node.target in TAGS or (node.op == "call_method" and node.target in _SELF_ONLY):
        first = node.args[0]
        return [first] if isinstance(first, fx.Node) else []
    writers = [user for user in node.users if _writes_to(user, node)]
    return [n for n in [*node.all_input_nodes, *writers] if not isinstance(example_value(n), _NO_DATA)]


def _writes_to(user: fx.Node, node: fx.Node) -> bool:
    if not user.args or user.args[0] is not node:
        return False
    if user.op == "call_method":
        name = str(user.target)
        return name.endswith("_") and not name.endswith("__")
    return user.target is operator.setitem


def _walk(start: fx.Node) -> Iterator[fx.Node]:
    """From a value backwards, breadth first; tags, projections and attention are yielded and not passed."""
    seen, todo = {start}, [start]
    for node in todo:
        yield node
        if node.target not in TAGS and node.target not in PROJECTIONS and not is_attention(node.target):
            parents = [parent for parent in data_parents(node) if parent not in seen]
            seen.update(parents)
            todo.extend(parents)


def find_tag(value: fx.Node) -> fx.Node | None:
    """The tag through which a query came, or None when its projection was not converted."""
    return next((node for node in _walk(value) if node.target in TAGS), None)


def projection_inputs(value: fx.Node) -> set[fx.Node]:
    """The inputs of the projections that made a value: one node for a plain projection, none for a free value."""
    projections = (node for node in _walk(value) if node.target in PROJECTIONS)
    arguments = ((p.args[0] if p.args else p.kwargs.get("input")) for p in projections)
    return {argument for argument in arguments if isinstance(argument, fx.Node)}


def is_dead(node: fx.Node) -> bool:
    """Whether nothing of the graph reads a value; Dynamo leaves the LSE of a call behind that nobody asked for."""
    reads = (
        node.op != "output" and not node.is_impure() and not any(_writes_to(node, arg) for arg in node.all_input_nodes)
    )
    return reads and all(is_dead(user) for user in node.users)


def erase_dead(node: fx.Node) -> None:
    """Erase a value that :func:`is_dead`, and what was computed from it."""
    for user in list(node.users):
        erase_dead(user)
    node.graph.erase_node(node)
