"""The spliced subgraphs compute what the definition computes, and keep where they came from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

import salad_compile
from salad_compile.config import BackendOptions
from salad_compile.definition.attention import sparse_attention
from salad_compile.definition.token_layout import Segments
from salad_compile.passes.driver import run_passes
from tests import toys
from tests.support import Recorder, check_rewrite, randomise_branches, relative_error

CONFIG = salad_compile.SaladConfig(
    compensation="none", sparsity=0.6, query_block=16, key_block=16, lora_rank=2, min_tokens=64
)
OPTIONS = {"sparsity": 0.6, "query_block": 16, "key_block": 16, "min_tokens": 64}


@pytest.mark.parametrize("attend", [toys.positional, toys.keywords, toys.mixed, toys.rotated_in_place])
def test_a_converted_call_becomes_salad(attend: toys.Attend) -> None:
    model = salad_compile.convert(toys.SelfAttention(attend), CONFIG, example_inputs=(toys.tokens(),))
    randomise_branches(model)
    recorder = check_rewrite(model, {"x": toys.tokens()}, sites=1, lowering="aot_eager")
    assert recorder.after["salad.linear_state"] == recorder.after["salad.linear_output"] == 1
    # the features of query and key, where the position encoding is run once more on them
    assert recorder.after["relu"] == (2 if attend is toys.rotated_in_place else 0)


@pytest.mark.parametrize("recompute", [False, True])
def test_only_converted_sites_of_a_stack_are_rewritten(recompute: bool) -> None:
    layers = [toys.SelfAttention(), toys.CrossAttention(), toys.SelfAttention(toys.causal), toys.SelfAttention()]
    model = toys.Stack(*layers)
    salad_compile.convert(model, CONFIG, example_inputs=(toys.tokens(),))
    model.recompute = recompute
    randomise_branches(model)
    recorder = check_rewrite(model, {"x": toys.tokens()}, sites=2, lowering="aot_eager")
    assert recorder.after["scaled_dot_product_attention"] == 2


@pytest.mark.parametrize(
    ("changes", "operator"), [({}, "attend_with_tail"), ({"compensation": "none"}, "block_sparse_attention")]
)
def test_an_unconverted_call_becomes_sparse_without_a_linear_branch(changes: dict[str, str], operator: str) -> None:
    options = OPTIONS | changes
    model, x = toys.SelfAttention(toys.keywords), toys.tokens()
    recorder = Recorder({"lowering": "eager", **options})
    out = torch.compile(model, backend=recorder, fullgraph=True)(x)
    assert recorder.after[f"salad.{operator}"] == 1
    assert recorder.after["salad.linear_state"] == 0
    q, k, v = (toys.heads(projection(x)) for projection in (model.q, model.k, model.v))
    by_hand = sparse_attention(q, k, v, Segments(0, 0, 0, 70), BackendOptions.from_options(options).spec, 0.5)
    assert relative_error(out, model.o(by_hand.transpose(1, 2).flatten(2))) < 1e-6
    assert relative_error(out, model(x)) > 1e-3


def test_spliced_nodes_inherit_their_origin_and_the_last_its_value() -> None:
    model, kept = toys.Stack(toys.SelfAttention()), []

    def backend(gm: fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., object]:
        before = next(n for n in gm.graph.nodes if "scaled_dot_product" in str(n.target))
        meta, users = dict(before.meta), len(before.users)
        run_passes(gm, BackendOptions.from_options(OPTIONS))
        spliced = [n for n in gm.graph.nodes if "salad" in str(n.target)]
        assert all(n.meta["stack_trace"] == meta["stack_trace"] for n in spliced)
        assert all(n.meta["nn_module_stack"] == meta["nn_module_stack"] for n in spliced)
        last = next(n for n in gm.graph.nodes if n.meta.get("example_value") is meta["example_value"])
        assert len(last.users) == users
        kept.append(last)
        return gm.forward

    torch.compile(model, backend=backend, fullgraph=True)(toys.tokens())
    assert len(kept) == 1


def test_autocast_results_keep_the_dtype_of_the_replaced_call() -> None:
    # at sparsity 0: in 16 bits a last digit may decide which of two near blocks is selected
    config = dataclasses.replace(CONFIG, sparsity=0.0)
    model = salad_compile.convert(toys.SelfAttention(), config, example_inputs=(toys.tokens(),))
    randomise_branches(model)
    x = toys.tokens()
    recorder = Recorder({"lowering": "aot_eager"})
    compiled = torch.compile(model, backend=recorder, fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        expected, actual = model(x), compiled(x)
    assert expected.dtype == actual.dtype == torch.bfloat16
    assert recorder.after["salad.block_sparse_attention"] == 1
    assert relative_error(actual, expected) < 1e-2
    assert relative_error(actual, model(x)) < 3e-2
