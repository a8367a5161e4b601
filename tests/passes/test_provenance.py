"""The walking rules, on graphs built by hand: each rule was a bug once."""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch import fx

from salad_compile.passes.provenance import data_parents, find_tag, module_path, projection_inputs


def graph_with_tag() -> tuple[fx.Graph, fx.Node, fx.Node]:
    """x -> linear -> tag."""
    graph = fx.Graph()
    x, weight, gate = (graph.placeholder(name) for name in ("x", "weight", "gate"))
    out = graph.call_function(F.linear, (x, weight))
    tag = graph.call_function(torch.ops.salad.tag.default, (out, x, [gate], None, "spec"))
    return graph, x, tag


def test_in_place_writers_are_parents() -> None:
    graph, _, tag = graph_with_tag()
    empty = graph.call_function(torch.empty_like, (tag,))
    fresh = graph.call_function(torch.zeros, ((3,),))
    graph.call_function(operator.setitem, (fresh, 0, tag))
    copied = graph.call_function(torch.zeros, ((3,),))
    graph.call_method("copy_", (copied, tag))
    for value in (empty, fresh, copied):
        assert find_tag(value) is tag


def test_shape_and_dtype_donors_are_not_parents() -> None:
    graph, x, tag = graph_with_tag()
    for method in ("type_as", "view_as", "expand_as"):
        assert find_tag(graph.call_method(method, (x, tag))) is None
        assert find_tag(graph.call_method(method, (tag, x))) is tag
    size = graph.call_method("size", (tag, 1))
    size.meta["example_value"] = 7
    assert find_tag(graph.call_function(torch.mul, (x, size))) is None


def test_the_gate_input_and_parameters_of_a_tag_are_not_followed() -> None:
    graph, x, tag = graph_with_tag()
    outer = graph.call_function(torch.ops.salad.tag.default, (x, tag, [tag], None, "spec"))
    assert data_parents(outer) == [x]


def test_walks_stop_at_projections_and_attention() -> None:
    graph, x, tag = graph_with_tag()
    weight = next(n for n in graph.nodes if n.name == "weight")
    again = graph.call_function(F.linear, (tag, weight))
    attended = graph.call_function(F.scaled_dot_product_attention, (tag, tag, tag))
    assert find_tag(again) is None
    assert find_tag(attended) is None
    assert projection_inputs(again) == {tag}
    assert projection_inputs(graph.call_function(torch.add, (attended, again))) == {tag}
    assert projection_inputs(x) == set()


def test_module_paths_are_readable() -> None:
    node = fx.Graph().placeholder("x")
    assert module_path(node) == ""
    for path, expected in {
        "L['self'].__dict__['_modules']['blocks'].0.attn1": "blocks.0.attn1",
        "L['self']._modules['blocks']._modules['1'].attn": "blocks.1.attn",
        "L['self'].attn": "attn",
    }.items():
        node.meta["nn_module_stack"] = {"key": (path, object)}
        assert module_path(node) == expected
