"""Every tier-1 video DiT of diffusers and three hand-written ones: discovery, invariants, eager = compiled."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import salad_compile
from salad_compile.branch import branches

from ..support import TINY, Recorder, Result, assert_same, check_rewrite, randomise_branches, relative_error, run
from .zoo import CASES, Case

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
# Inductor takes a minute for a whole model of two blocks: these stand for the two kinds of blocks, attention modules
# and inline attention. Every case goes through Inductor per block below.
WHOLE_MODEL_INDUCTOR = ("Wan", "handwritten_inline")


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def converted(case: Case, *, randomise: bool = True, **changes: Any) -> nn.Module:
    model = salad_compile.convert(
        case.build(), dataclasses.replace(TINY, **changes), example_inputs=dict(case.inputs(0))
    )
    if randomise:
        randomise_branches(model)
    return model


def bounds(case: Case) -> dict[str, float]:
    """Outputs and gradients agree to fp32 rounding; to that of bf16 (half a step) where a model rounds to bf16 inside.

    Kandinsky5 rotates query and key in bf16 whatever its dtype: a last bit of fp32 may flip one of bf16.
    """
    if case.name == "Kandinsky5":
        return {"bound": 2.0**-9, "gradient_bound": 2.0**-9}
    return {"bound": 1e-5, "gradient_bound": 1e-4}


@every_case
def test_discovery_finds_exactly_the_video_self_attention(case: Case) -> None:
    model = case.build()
    plan = salad_compile.plan(model, dict(case.inputs(0)), config=TINY)
    assert tuple(site.name for site in plan.eligible) == case.sites
    assert all(site.kind == "self" for site in plan.eligible)
    first = plan.eligible[0].record()
    assert first.projections() == case.projections
    assert not branches(model)


@every_case
def test_sparsity_zero_equals_dense(case: Case) -> None:
    inputs = case.inputs(0)
    dense = run(case.build(), inputs, case.output, gradients=False)
    salad = run(converted(case, randomise=False, sparsity=0.0), inputs, case.output, gradients=False)
    assert relative_error(salad.output, dense.output) <= 1e-5


@every_case
def test_zero_projection_equals_pure_sparse(case: Case) -> None:
    inputs = case.inputs(0)
    fresh = converted(case, randomise=False)
    salad = run(fresh, inputs, case.output, gradients=False)
    options = {"lowering": "eager", **{name: getattr(TINY, name) for name in SPARSE_OPTIONS}}
    recorder = Recorder(options)
    unconverted = torch.compile(case.build(), backend=recorder, fullgraph=True)
    sparse = run(unconverted, inputs, case.output, gradients=False)
    assert recorder.after["salad.block_sparse_attention"] == len(case.sites)
    assert recorder.after["salad.pool_and_summarise"] == 0
    assert relative_error(salad.output, sparse.output) <= 1e-5
    dense = run(case.build(), inputs, case.output, gradients=False)
    assert relative_error(sparse.output, dense.output) > 1e-3, "sparse attention changes nothing: the test is vacuous"
    randomise_branches(fresh)
    full = run(fresh, inputs, case.output, gradients=False)
    assert relative_error(full.output, sparse.output) > 1e-3, "the branch changes nothing: the test is vacuous"


SPARSE_OPTIONS = ("sparsity", "query_block", "key_block", "min_tokens")


@every_case
def test_eager_equals_compiled(case: Case) -> None:
    recorder = check_rewrite(converted(case), case.inputs(0), case.output, sites=len(case.sites))
    assert recorder.graphs == 1
    assert recorder.after["salad.pool_and_summarise"] == len(case.sites)


@every_case
def test_eager_equals_compiled_per_block_through_inductor(case: Case) -> None:
    model, inputs = converted(case), case.inputs(0)
    expected = run(model, inputs, case.output)
    # without it Inductor drops casts to 16 bits and back, and so computes something else than the model says
    options = {"inductor": {"emulate_precision_casts": True}}
    for name in case.repeated_blocks:
        model.get_submodule(name).compile(backend="salad", fullgraph=True, options=options)
    actual = run(model, inputs, case.output)
    assert_same(actual, expected, **bounds(case))
    _assert_distinct_gradients(actual, case)


def _assert_distinct_gradients(result: Result, case: Case) -> None:
    """One compiled graph serves all blocks: parameters baked into it would give the first block all gradients."""
    gates = [result.gradients[f"{site}.salad.gate_weight"] for site in case.sites]
    for other in gates[1:]:
        assert relative_error(other, gates[0]) > 1e-2


@pytest.mark.parametrize("name", WHOLE_MODEL_INDUCTOR)
def test_eager_equals_whole_model_through_inductor(name: str) -> None:
    case = CASES[name]
    model, inputs = converted(case), case.inputs(0)
    expected = run(model, inputs, case.output)
    compiled = torch.compile(model, backend="salad", fullgraph=True)
    assert_same(run(compiled, inputs, case.output, parameters=model), expected)


@every_case
def test_gradient_checkpointing(case: Case) -> None:
    model, inputs = converted(case), case.inputs(0)
    expected = run(model, inputs, case.output)
    for name in case.repeated_blocks:
        _checkpointed(model.get_submodule(name))
    assert_same(run(model, inputs, case.output), expected)
    recorder = Recorder()
    compiled = torch.compile(model, backend=recorder, fullgraph=True)
    assert_same(run(compiled, inputs, case.output, parameters=model), expected)
    # attention lies in the bodies of the checkpoints, once for each site (Latte's shared blocks included)
    assert recorder.after["salad.block_sparse_attention"] == len(case.sites)


def _checkpointed(block: nn.Module) -> None:
    """Non-reentrant activation checkpointing of one block, for classes with and without a switch for it."""
    forward = block.forward

    def recompute(*args: Any, **kwargs: Any) -> Tensor:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    block.forward = recompute


@every_case
def test_second_resolution_costs_at_most_one_compile(case: Case) -> None:
    model = converted(case)
    recorder = Recorder({"lowering": "eager"})
    compiled = torch.compile(model, backend=recorder, fullgraph=True)
    for resolution in (0, 1, 0, 1):
        inputs = case.inputs(resolution)
        expected = run(model, inputs, case.output, gradients=False)
        actual = run(compiled, inputs, case.output, parameters=model, gradients=False)
        assert relative_error(actual.output, expected.output) <= 1e-5
    assert recorder.graphs <= 2
