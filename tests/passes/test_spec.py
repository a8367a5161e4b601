"""The spec of emitted graphs sees every violation of every rule, and agrees with the operators."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

import salad_compile
from salad_compile.kernels.exchange import api as _exchange  # registers its operators
from salad_compile.passes.driver import watch_passes
from salad_compile.passes.spec import MARKERS, OPERATORS, RULES, Call, verify
from tests import toys
from tests.passes.emitted import emitted_graph

assert _exchange
CONFIG = salad_compile.SaladConfig(
    compensation="none", sparsity=0.6, query_block=16, key_block=32, lowest_sparsity=0.5, min_tokens=64
)
DTYPES = {"f": torch.float32, "i": torch.int32, "b": torch.bool}


def masked_and_rotated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Position, and key padding."""
    angle = torch.arange(q.shape[-2], dtype=q.dtype).unsqueeze(-1) * 0.1
    mask = (torch.arange(k.shape[-2]) < k.shape[-2] - 9).expand(k.shape[0], 1, 1, -1)
    return F.scaled_dot_product_attention(q * angle.cos(), k * angle.cos(), v, attn_mask=mask)


@functools.cache
def _graph(pattern: str) -> fx.Graph:
    attend = toys.positional if pattern == "stswa" else masked_and_rotated
    attend = toys.rotated_in_place if pattern in ("prepared", "moved") else attend
    config = {**CONFIG.to_dict(), "pattern": "topk" if pattern in ("tail", "prepared", "moved") else pattern}
    if pattern in ("tail", "moved"):
        config |= {"compensation": "tail", "compensation_pool": 64}
    model = salad_compile.convert(
        toys.SelfAttention(attend), config, example_inputs=(toys.tokens(105),), grid=(3, 5, 7)
    )
    return emitted_graph(model, toys.tokens(105), prepare_operands=pattern in ("prepared", "moved"))


def graph_of(pattern: str = "topk") -> fx.Graph:
    """An emitted graph to be spoilt. Of "topk": with key padding, position, and tokens moved into tiles.

    Of "tail": the same with compensation. Of "moved": that, without key padding, with operands that are prepared.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(_graph(pattern), {}))
    assert not verify(graph)
    return graph


def call_of(graph: fx.Graph, name: str) -> Call:
    return next(call for call in map(Call.of, graph.nodes) if call is not None and call.name == name)


def attention_in(graph: fx.Graph) -> str:
    """The operator that attends in a graph."""
    names = {call.name for call in map(Call.of, graph.nodes) if call is not None}
    return "attend_with_tail" if "attend_with_tail" in names else "block_sparse_attention"


def put(graph: fx.Graph, name: str, argument: str, value: Any) -> None:
    """Give a call of an operator another argument."""
    call = call_of(graph, name)
    position = list(call.kinds).index(argument)
    assert position < len(call.node.args), "not given before"
    call.node.update_arg(position, value)


def add(
    node: fx.Node, target: Any, *args: Any, like: fx.Node | None = None, dtype: torch.dtype | None = None
) -> fx.Node:
    """A new node behind a node, with the value of that one or of another."""
    with node.graph.inserting_after(node):
        new = node.graph.call_function(target, args)
    value = node.meta["example_value"]
    new.meta["example_value"] = value if dtype is None else value.to(dtype)
    return new


def as_half(graph: fx.Graph, name: str, argument: str) -> None:
    value = call_of(graph, name)[argument]
    put(graph, name, argument, add(value, torch.ops.aten.to.dtype, value, torch.bfloat16, dtype=torch.bfloat16))


def swap_lut(graph: fx.Graph) -> None:
    selection = call_of(graph, "select_blocks").node
    with graph.inserting_after(selection):
        again = graph.node_copy(selection)
    with graph.inserting_after(again):
        lut = graph.call_function(operator.getitem, (again, 0))
    lut.meta["example_value"] = again.meta["example_value"][0]
    put(graph, attention_in(graph), "lut", lut)


def swap_sums(graph: fx.Graph) -> None:
    """The sums over keys of one call, and the state of another."""
    state = call_of(graph, "linear_state").node
    with graph.inserting_after(state):
        again = graph.node_copy(state)
    with graph.inserting_after(again):
        key_sum = graph.call_function(operator.getitem, (again, 1))
    key_sum.meta["example_value"] = again.meta["example_value"][1]
    put(graph, "linear_output", "key_sum", key_sum)


def other_query(graph: fx.Graph) -> None:
    put(graph, attention_in(graph), "query", call_of(graph, attention_in(graph))["key"])


def unmoved_value(graph: fx.Graph) -> None:
    moved = Call.of(call_of(graph, attention_in(graph))["value"])
    assert moved is not None
    put(graph, attention_in(graph), "value", moved["x"])


def read_lse(graph: fx.Graph) -> None:
    node = call_of(graph, attention_in(graph)).node
    with graph.inserting_after(node):
        graph.call_function(operator.getitem, (node, 1))


def keep_moved(graph: fx.Graph) -> None:
    last = [call for call in map(Call.of, graph.nodes) if call is not None and call.name == "take_rows"][-1]
    last.node.replace_all_uses_with(last["x"])
    graph.erase_node(last.node)


def pools_of_others(graph: fx.Graph) -> None:
    """Of values that another call moved."""
    moved = call_of(graph, "take_rows_with_means").node
    with graph.inserting_after(moved):
        again = graph.node_copy(moved)
    with graph.inserting_after(again):
        pools = graph.call_function(operator.getitem, (again, 1))
    pools.meta["example_value"] = again.meta["example_value"][1]
    put(graph, "attend_with_tail", "pooled_value", pools)


def without_detach(graph: fx.Graph) -> None:
    detached = call_of(graph, "pool_blocks")["x"]
    put(graph, "pool_blocks", "x", detached.args[0])


def without_detach_of_values(graph: fx.Graph) -> None:
    detached = call_of(graph, "select_by_mass")["value"]
    put(graph, "select_by_mass", "value", detached.args[0])


def swap_results(graph: fx.Graph, name: str) -> None:
    """The features in the place of the rows without position."""
    call = call_of(graph, name)
    role = "query" if name == "linear_output" else "key"
    put(graph, name, role, call[f"rotated_{role}"])


PLANTS: dict[tuple[str, str], Callable[[fx.Graph], None]] = {
    ("block_sparse_attention", "query, key and value have one dtype"): lambda g: as_half(
        g, "block_sparse_attention", "value"
    ),
    ("linear_state", "key and value have one dtype"): lambda g: as_half(g, "linear_state", "rotated_key"),
    ("linear_output", "the query has one dtype"): lambda g: as_half(g, "linear_output", "rotated_query"),
    ("select_blocks", "pooled query and key have one dtype"): lambda g: as_half(g, "select_blocks", "pooled_key"),
    ("block_sparse_attention", "lut and count are the results of one selection"): swap_lut,
    ("block_sparse_attention", "it has the blocks of its selection"): lambda g: put(
        g, attention_in(g), "key_block", 16
    ),
    ("block_sparse_attention", "it has the key mask of its selection"): lambda g: put(
        g, attention_in(g), "key_mask", None
    ),
    ("block_sparse_attention", "the selection is of its query and key"): other_query,
    ("block_sparse_attention", "query, key and value are in one order"): unmoved_value,
    ("block_sparse_attention", "nothing reads its lse"): read_lse,
    ("take_rows", "the rows are put back"): keep_moved,
    ("select_blocks", "its means are of its blocks"): lambda g: put(g, "pool_blocks", "block", 32),
    ("pool_blocks", "no gradient flows into a selection"): without_detach,
    ("select_by_mass", "no gradient flows into a selection"): without_detach_of_values,
    ("linear_output", "state and key_sum are the results of one linear_state"): swap_sums,
    ("linear_output", "it has the feature map of its state"): lambda g: put(g, "linear_output", "feature_map", "elu"),
    ("linear_output", "position is in its query and its keys, or in neither"): lambda g: put(
        g, "linear_output", "rotated_query", None
    ),
    ("attend_with_tail", "query, key, value and pools have one dtype"): lambda g: as_half(
        g, "attend_with_tail", "pooled_key"
    ),
    ("linear_output", "its query and features are of one preparation"): lambda g: swap_results(g, "linear_output"),
    ("linear_state", "its key and features are of one preparation"): lambda g: swap_results(g, "linear_state"),
    ("prepare_operand", "the rows of a preparation are put back"): keep_moved,
    ("prepare_operand", "a preparation has a norm for its weight and bias"): lambda g: put(
        g, "prepare_operand", "weight", next(n for n in g.nodes if n.op == "placeholder")
    ),
    ("take_rows_with_means", "the rows are put back"): keep_moved,
    ("attend_with_tail", "pools that were moved with values are of its values"): pools_of_others,
    ("attend_with_tail", "its pools are counted from its lists"): lambda g: put(g, "tail_tokens", "key_mask", None),
}


@pytest.mark.parametrize("rule", [rule[:2] for rule in RULES], ids=[f"{rule[0]}: {rule[1]}" for rule in RULES])
def test_each_rule_names_its_violation(rule: tuple[str, str]) -> None:
    """A rule without a planted violation has no entry here, and fails."""
    name, says = rule
    others = {"attend_with_tail": "tail", "select_by_mass": "error8", "take_rows_with_means": "moved"}
    of_rule = {"moved": "moved with" in says, "prepared": "preparation" in says}
    graph = graph_of(next((kind for kind, is_needed in of_rule.items() if is_needed), others.get(name, "topk")))
    PLANTS[rule if rule in PLANTS else ("block_sparse_attention", says)](graph)
    graph.lint()
    found = verify(graph)
    assert any(violation.startswith(name) and violation.endswith(f": {says}") for violation in found), found
    assert len(found) <= 3, "it spoilt more than it says"


def test_windows_have_no_mask_and_are_of_their_query() -> None:
    graph = graph_of("stswa")
    attention = call_of(graph, "block_sparse_attention")
    put(graph, "block_sparse_attention", "key_mask", next(n for n in graph.nodes if n.op == "placeholder"))
    assert f"{attention.node.name}: it has the key mask of its selection" in verify(graph)
    graph = graph_of("stswa")
    put(graph, "window_blocks", "query", call_of(graph, "block_sparse_attention")["key"])
    assert verify(graph) == [f"{attention.node.name}: the selection is of its query and key"]


@pytest.mark.parametrize("name", OPERATORS)
def test_the_spec_names_the_arguments_of_the_operators(name: str) -> None:
    schema = getattr(torch.ops.salad, name).default._schema
    call = Call(fx.Graph().placeholder("x"), name)
    assert list(call.kinds) == [argument.name for argument in schema.arguments]
    assert len(call.results) == len(schema.returns)
    for argument in schema.arguments:
        text, optional = str(argument.type), call.kinds[argument.name].endswith("?")
        kind = {"F": "List[Tensor]", "n": "int", "s": "float", "t": "str"}
        wanted = kind.get(call.kinds[argument.name][0], "Tensor")
        assert text == (f"Optional[{wanted}]" if optional else wanted)


def wrong(kind: str) -> list[Any]:
    """Values that are not of a kind."""
    letter = kind[0]
    if letter in "nst":
        return [{"n": 1.5, "s": 2, "t": 3}[letter], None, torch.zeros(())]
    if letter == "F":
        return [torch.zeros((2,) * 4), None, [torch.zeros(2)], [torch.zeros((2,) * 4, dtype=torch.int32)]]
    rank = int(kind[1])
    if letter == "a":
        return [torch.zeros((2,) * 6), 3, None]
    fits, other = torch.zeros((2,) * rank, dtype=DTYPES[letter]), torch.int64 if letter != "b" else torch.int32
    return [fits.to(other), fits.new_zeros((2,) * 6), 3, *([] if kind.endswith("?") else [None])]


@pytest.mark.parametrize("name", OPERATORS)
def test_an_argument_of_a_wrong_kind_is_named(name: str) -> None:
    call = Call(fx.Graph().placeholder("x"), name)
    for argument, kind in call.kinds.items():
        for value in wrong(kind):
            call.arguments = {argument: value}
            assert f"{argument} is of kind {kind}" in call.misfits(), value
    call.arguments = {"order": None}
    assert ("it has no argument order" in call.misfits()) == ("order" not in call.kinds)


def test_a_result_of_a_wrong_kind_is_named() -> None:
    graph = graph_of()
    selection = call_of(graph, "select_blocks").node
    lut, count = selection.meta["example_value"]
    selection.meta["example_value"] = (lut, count.long())
    assert f"{selection.name}: its recorded results are of kind i4 i3" in verify(graph)
    del selection.meta["example_value"]
    assert f"{selection.name}: its recorded results are of kind i4 i3" in verify(graph)


def test_sums_over_processes_are_sums_all_the_same() -> None:
    graph = graph_of()
    output = call_of(graph, "linear_output")
    for argument in ("state", "key_sum"):
        value = output[argument]
        put(graph, "linear_output", argument, add(value, torch.ops.salad.sum_of_processes.default, value, "group"))
    assert not verify(graph)
    swap_sums(graph)
    assert verify(graph) == [f"{output.node.name}: state and key_sum are the results of one linear_state"]


def test_markers_and_foreign_operators_are_violations() -> None:
    graph = graph_of()
    first = next(iter(graph.nodes))
    marker = add(first, torch.ops.salad.projected.default, first)
    foreign = add(first, torch.ops.salad.linear_state_backward.default, first)
    wrong = f"{foreign.name}: salad::linear_state_backward does not belong into an emitted graph"
    assert sorted(verify(graph)) == sorted([wrong, f"{marker.name}: markers are erased"])
    assert verify(graph, erased=False) == [wrong]
    assert all(hasattr(torch.ops.salad, name) for name in MARKERS)


def test_the_suite_checks_every_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fixture of conftest.py is on: a rule that nothing satisfies is noticed in the pass that breaks it."""
    broken = ("take_rows", "never", lambda call: False)
    monkeypatch.setattr("salad_compile.passes.spec.RULES", (*RULES, broken))
    seen: list[str] = []
    model = salad_compile.convert(toys.SelfAttention(), CONFIG, example_inputs=(toys.tokens(105),), grid=(3, 5, 7))
    with (
        watch_passes(lambda gm, context: seen.append(context.done[-1])),
        pytest.raises(Exception, match=r"after rewrite_attention: take_rows\w*: never"),
    ):
        emitted_graph(model, toys.tokens(105))
    assert seen == ["find_attention", "settle_calls", "check_rows", "prepare_operands", "replay_position"]
