"""Graph breaks between projection and attention: which modules run uncompiled, and that copies do not share it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import salad_compile
from salad_compile.backend.dynamo import record_graphs
from salad_compile.kernels import measure_executions
from salad_compile.passes.context import Context
from salad_compile.passes.driver import watch_passes
from salad_compile.sites.branch import branches
from salad_compile.sites.graph_breaks import leave_uncompiled
from tests import toys
from tests.support import assert_same, randomise_branches, relative_error, run

CONFIG = salad_compile.SaladConfig(
    compensation="none", sparsity=0.6, query_block=16, key_block=16, lora_rank=2, min_tokens=64
)
X = {"x": toys.tokens()}
AOT = {"lowering": "aot_eager"}
"""The definition of a module that runs uncompiled is compiled, unless lowering is "eager"."""


class Broken(toys.SelfAttention):
    """Breaks the graph after its projections."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (toys.heads(p(x)) for p in (self.q, self.k, self.v))
        torch._dynamo.graph_break()
        out: Tensor = self.o(toys.positional(q, k, v).transpose(1, 2).flatten(2))
        return out


class Whole(toys.SelfAttention):
    pass


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def mixed() -> toys.Stack:
    model = toys.Stack(Whole(), Broken(), Whole(), Broken())
    salad_compile.convert(model, CONFIG, example_inputs=X)
    randomise_branches(model)
    return model


def uncompiled(model: nn.Module) -> list[str]:
    return [branch.record.owner for branch in branches(model).values() if branch.uncompiled]


def compile_and_compare(model: nn.Module, **options: Any) -> list[Any]:
    expected = run(model, X)
    compiled = torch.compile(model, backend="salad", options={"lowering": "eager", **options})
    with record_graphs() as graphs, measure_executions() as executions:
        assert_same(run(compiled, X, parameters=model), expected)
    assert len(executions) == len(branches(model))
    return graphs


def test_only_the_class_that_breaks_runs_uncompiled() -> None:
    model = mixed()
    graphs = compile_and_compare(model)
    assert uncompiled(model) == ["layers.1", "layers.3"]
    assert [graph.uncompiled for graph in graphs if graph.uncompiled] == [("layers.1", "layers.3")]
    # the others are in compiled graphs, as SALAD
    assert sum(graph.count("salad") for graph in graphs) >= 2


def test_their_definition_is_compiled_once() -> None:
    """Beside the break: a graph of it for all sites of the class, and one for all other sizes."""
    model = toys.Stack(Broken(), Broken())
    salad_compile.convert(model, CONFIG, example_inputs=X)
    randomise_branches(model)
    found: list[int] = []

    def watch(gm: torch.fx.GraphModule, context: Context) -> None:
        if len(context.done) == 1:
            found.append(sum(n.target is torch.ops.salad.block_sparse_attention.default for n in gm.graph.nodes))

    with watch_passes(watch):
        compile_and_compare(model, **AOT)
        assert sum(found) == 1, found
        with torch.no_grad():
            compiled = torch.compile(model, backend="salad", options=AOT)
            for tokens in (toys.tokens(131), toys.tokens(187), toys.tokens(90)):
                assert relative_error(compiled(tokens), model(tokens)) < 1e-6
    assert sum(found) == 2, found


def test_other_models_are_not_concerned() -> None:
    """Converted with the very same configuration, from the same classes, and with no grid to tell them apart."""
    model, other = mixed(), mixed()
    compile_and_compare(model)
    assert uncompiled(model)
    assert not uncompiled(other)
    compile_and_compare(other)
    assert uncompiled(other) == uncompiled(model)


# both ask for the same state: `test_copies_are_complete_and_independent` holds what one keeps against the other
@pytest.mark.parametrize(
    "copier",
    [
        pytest.param(copy.deepcopy, id="deepcopy"),
        pytest.param(lambda m: pickle.loads(pickle.dumps(m)), id="pickle", marks=pytest.mark.all_cases),
    ],
)
def test_copies_decide_for_themselves(copier: Any) -> None:
    model = mixed()
    twin = copier(model)
    compile_and_compare(twin)
    assert (uncompiled(model), uncompiled(twin)) == ([], ["layers.1", "layers.3"])
    torch._dynamo.reset()
    compile_and_compare(model)
    assert uncompiled(model) == ["layers.1", "layers.3"]
    # a copy of what has been found out knows it
    torch._dynamo.reset()
    third = copier(model)
    assert uncompiled(third) == ["layers.1", "layers.3"]
    assert not any(graph.uncompiled for graph in compile_and_compare(third))


def test_compiled_per_block() -> None:
    model = mixed()
    expected = run(model, X)
    for layer in model.layers:
        layer.compile(backend="salad", options={"lowering": "aot_eager"})
    with measure_executions() as executions:
        assert_same(run(model, X), expected)
    assert len(executions) == 4
    assert uncompiled(model) == ["layers.1", "layers.3"]


def test_under_activation_checkpointing() -> None:
    model = mixed()
    expected = run(model, X)
    for layer in model.layers:
        forward = layer.forward
        layer.forward = lambda x, forward=forward: checkpoint(forward, x, use_reentrant=False)
    compiled = torch.compile(model, backend="salad", options={"lowering": "aot_eager"})
    assert_same(run(compiled, X, parameters=model), expected)


def test_fullgraph_is_dynamos_error() -> None:
    with pytest.raises(torch._dynamo.exc.Unsupported, match="graph_break"):
        torch.compile(mixed(), backend="salad", fullgraph=True, options={"lowering": "eager"})(**X)


def test_an_unknown_mark_belongs_to_no_branch() -> None:
    model = mixed()
    mark = model.layers[0].salad.mark
    assert leave_uncompiled(mark.detach().clone(), {}) == []
    assert leave_uncompiled(mark, {}) == ["layers.0", "layers.2"]
    assert leave_uncompiled(model.layers[3].salad.mark, {}) == ["layers.3", "layers.1"]  # the one that was asked first
    assert uncompiled(model) == ["layers.0", "layers.1", "layers.2", "layers.3"]


def test_branches_are_not_kept_alive() -> None:
    import gc
    import weakref

    model = mixed()
    branch = weakref.ref(model.layers[0].salad)
    mark = model.layers[0].salad.mark
    del model
    gc.collect()
    assert branch() is None
    assert leave_uncompiled(mark, {}) == []
