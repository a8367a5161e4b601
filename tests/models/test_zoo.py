"""Every video DiT of diffusers and the hand-written ones: discovery, the invariants, eager = compiled, saving."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch.utils.checkpoint import checkpoint

import salad_compile
from salad_compile.backend.dynamo import record_graphs
from salad_compile.kernels import measure_executions
from salad_compile.sites.branch import branches
from tests.models.expectations import DENSE, GAPS, converted_sites, seen_as
from tests.models.kinds import CHECKPOINTS, PER_BLOCK, RESOLUTIONS, WHOLE, by_default, every_case, marks_of
from tests.models.registry import ALL_CASES
from tests.models.zoo import Case
from tests.support import (
    TINY,
    Recorder,
    Result,
    assert_same,
    converted,
    differentiable,
    probed,
    randomise_branches,
    relative_error,
    run,
)

# Dynamo and our passes see every case, whole and per block; what they make runs as it is. Inductor takes up to a minute
# for a block, and so sees the plainest. What is False needs `--all-cases`: by default those of PER_BLOCK_AOT end with
# AOTAutograd, and tests/end_to_end/test_caches.py takes a whole model through Inductor. So do, with it, `test_modes` of
# tests/end_to_end/test_compile_matrix.py, and `test_through_inductor` of tests/passes/test_replay_position.py text and
# video in one stream.
WHOLE_MODEL_INDUCTOR = {"Wan": False, "handwritten_inline": False}
PER_BLOCK_INDUCTOR = {
    "Wan": True,
    "handwritten_inline": False,
    "CogVideoX": False,
    "handwritten_fused": False,
    "HunyuanVideo": False,
    "Cosmos3Omni": False,
}
# The graph that Inductor would get, with its functions made pure and its backward split off, but run as it is.
PER_BLOCK_AOT = ("handwritten_inline", "CogVideoX")
# The backend on a model that nobody converted; by default on an attention module, inline attention, and shared blocks.
TRAINING_FREE = {
    "Wan": True,
    "handwritten_fused": False,
    "handwritten_inline": True,
    "LTXVideo": False,
    "Cosmos": False,
    "Latte": True,
}


def named(cases: dict[str, bool]) -> pytest.MarkDecorator:
    """Parametrise by name; not by case, which would be a column of the support table."""
    default = [name for name, runs in cases.items() if runs]
    return pytest.mark.parametrize("name", [pytest.param(name, marks=marks_of(name, default)) for name in cases])


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _flex_under_autograd(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU flex_attention refuses tensors that require gradients, while Dynamo traces it.

    In this case it never runs: all its calls become SALAD.
    """
    case = request.node.callspec.params.get("case") if hasattr(request.node, "callspec") else None
    if case is not None and case.name == "handwritten_flex":
        monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)


def bounds(case: Case) -> dict[str, float]:
    """Outputs and gradients agree to fp32 rounding; to that of bf16 (half a step) where a model rounds to bf16 inside.

    A last bit of fp32 may flip one of bf16: Kandinsky rotates query and key in bf16 whatever its dtype, and SanaWM
    attends in bf16.
    """
    if case.name.startswith(("Kandinsky", "SanaWM")):
        return {"bound": 2.0**-9, "gradient_bound": 2.0**-8}
    return {"bound": 1e-5, "gradient_bound": 1e-4}


def same(case: Case, actual: Result, expected: Result, **changes: Any) -> None:
    """`assert_same`, but for what the model computes and then drops."""
    dropped = GAPS.get(case.name, ())
    assert_same(actual, expected, **changes, may_vanish=lambda name: any(part in name for part in dropped))


@every_case
def test_discovery_finds_exactly_the_video_self_attention(case: Case) -> None:
    model = case.build()
    plan = probed(case, model)
    assert tuple(site.name for site in plan.eligible) == converted_sites(case)
    first = plan.eligible[0]
    assert (first.kind, first.text) == seen_as(case)
    text = {f"text_{role}": name for role, name in case.text_projections.items()} if first.kind == "joint" else {}
    assert first.record().projections() == {**case.projections, **text}
    assert not branches(model)


@pytest.mark.parametrize("name", DENSE)
def test_what_cannot_be_converted_says_why(name: str) -> None:
    case = ALL_CASES[name]
    model = case.build()
    before = run(model, case.inputs(0), case.output, gradients=False)
    with pytest.raises(salad_compile.NoEligibleSiteError) as error:  # type: ignore[attr-defined]
        salad_compile.convert(model, TINY, example_inputs=dict(case.inputs(0)))
    assert DENSE[name].seen in " ".join(str(error.value).split())
    assert not branches(model)
    assert torch.equal(run(model, case.inputs(0), case.output, gradients=False).output, before.output)


@every_case
def test_sparsity_zero_equals_dense(case: Case) -> None:
    inputs = case.inputs(0)
    dense = run(case.build(), inputs, case.output, gradients=False)
    salad = run(converted(case, randomise=False, sparsity=0.0), inputs, case.output, gradients=False)
    assert relative_error(salad.output, dense.output) <= bounds(case)["bound"]


@every_case
def test_zero_projection_equals_pure_sparse(case: Case) -> None:
    inputs = case.inputs(0)
    model = converted(case, randomise=False)
    salad = run(model, inputs, case.output, gradients=False)
    alone = converted(case, randomise=False, linear_branch=False)
    sparse = run(alone, inputs, case.output, gradients=False)
    assert relative_error(salad.output, sparse.output) <= 1e-5
    dense = run(case.build(), inputs, case.output, gradients=False)
    assert relative_error(sparse.output, dense.output) > 1e-3, "sparse attention changes nothing: the test is vacuous"
    randomise_branches(model)
    full = run(model, inputs, case.output, gradients=False)
    assert relative_error(full.output, sparse.output) > 1e-3, "the branch changes nothing: the test is vacuous"


@named(TRAINING_FREE)
def test_zero_projection_equals_training_free_compilation(name: str) -> None:
    """The backend, which sees a base model and knows no grid, computes what a fresh conversion in flat order does."""
    case = ALL_CASES[name]
    inputs = case.inputs(0)
    salad = run(converted(case, randomise=False, token_order="flat"), inputs, case.output, gradients=False)
    recorder = Recorder({"lowering": "eager", **{option: getattr(TINY, option) for option in SPARSE_OPTIONS}})
    unconverted = torch.compile(case.build(), backend=recorder, fullgraph=True)
    sparse = run(unconverted, inputs, case.output, gradients=False)
    assert recorder.after["salad.block_sparse_attention"] == len(case.sites)
    assert recorder.after["salad.linear_state"] == 0
    assert relative_error(salad.output, sparse.output) <= 1e-5


SPARSE_OPTIONS = ("sparsity", "query_block", "key_block", "compensation", "min_tokens")


@by_default(WHOLE)
def test_eager_equals_compiled(case: Case) -> None:
    model, inputs = converted(case), case.inputs(0)
    expected = run(model, inputs, case.output)
    recorder = Recorder({"lowering": "eager"})
    compiled = torch.compile(model, backend=recorder, fullgraph=case.fullgraph)
    with measure_executions() as executions:
        actual = run(compiled, inputs, case.output, parameters=model)
    same(case, actual, expected)
    # counted when it ran: no site is dense, whatever the graphs look like
    assert len(executions) == len(converted_sites(case)) * case.calls
    assert recorder.after["salad.tag"] == recorder.after["salad.site"] == 0
    if case.fullgraph:
        assert recorder.graphs == 1
        assert recorder.after["salad.linear_state"] == len(executions)


@by_default(PER_BLOCK)
def test_eager_equals_compiled_per_block(case: Case) -> None:
    model, inputs = converted(case), differentiable(case.inputs(0))
    expected = run(model, inputs, case.output)
    for name in case.repeated_blocks:
        lowering = "aot_eager" if case.name in PER_BLOCK_AOT else "eager"
        model.get_submodule(name).compile(backend="salad", options={"lowering": lowering})
    with measure_executions() as executions:
        actual = run(model, inputs, case.output)
    same(case, actual, expected)
    assert len(executions) == len(converted_sites(case)) * case.calls
    _assert_distinct_gradients(actual, case)


@named(PER_BLOCK_INDUCTOR)
def test_eager_equals_compiled_per_block_through_inductor(name: str) -> None:
    case = ALL_CASES[name]
    model, inputs = converted(case), differentiable(case.inputs(0))
    expected = run(model, inputs, case.output)
    # without it Inductor drops casts to 16 bits and back, and so computes something else than the model says
    options = {"inductor": {"emulate_precision_casts": True}}
    for block in case.repeated_blocks:
        model.get_submodule(block).compile(backend="salad", fullgraph=True, options=options)
    with record_graphs() as graphs:
        actual, code = run_and_get_code(run, model, inputs, case.output)
    # the order of tokens was decomposed: otherwise Inductor could not fuse the gather with what writes the rows
    assert "ops.salad.block_sparse_attention" in "".join(code)
    assert "ops.salad.take_rows" not in "".join(code)
    # HunyuanVideo has two kinds of blocks; of CogVideoX two were seen
    most = {"HunyuanVideo": 3, "CogVideoX": 2}.get(name, 1)
    assert sum(graph.count("salad") > 0 for graph in graphs) <= most
    same(case, actual, expected, **bounds(case))
    _assert_distinct_gradients(actual, case)


def _assert_distinct_gradients(result: Result, case: Case) -> None:
    """One compiled graph serves all blocks: parameters baked into it would give the first block all gradients."""
    gates = [result.gradients[f"{site}.salad.gate_weight"] for site in dict.fromkeys(converted_sites(case))]
    for other in gates[1:]:
        assert other.shape != gates[0].shape or relative_error(other, gates[0]) > 1e-2


@named(WHOLE_MODEL_INDUCTOR)
def test_eager_equals_whole_model_through_inductor(name: str) -> None:
    case = ALL_CASES[name]
    model, inputs = converted(case), case.inputs(0)
    expected = run(model, inputs, case.output)
    compiled = torch.compile(model, backend="salad", fullgraph=True)
    assert_same(run(compiled, inputs, case.output, parameters=model), expected)


@by_default(CHECKPOINTS)
def test_gradient_checkpointing(case: Case) -> None:
    model, inputs = converted(case), case.inputs(0)
    expected = run(model, inputs, case.output)
    for name in case.repeated_blocks:
        _checkpointed(model.get_submodule(name))
    same(case, run(model, inputs, case.output), expected)
    # a length that only the run knows does not get into the body of a checkpoint in one graph (torch 2.11)
    fullgraph = case.fullgraph and case.fake
    recorder = Recorder({"lowering": "eager"})
    compiled = torch.compile(model, backend=recorder, fullgraph=fullgraph)
    same(case, run(compiled, inputs, case.output, parameters=model), expected)
    if not fullgraph:
        return
    # attention lies in the bodies of the checkpoints, once for each site (Latte's shared blocks included)
    assert recorder.after["salad.block_sparse_attention"] == len(converted_sites(case)) * case.calls


def _checkpointed(block: nn.Module) -> None:
    """Non-reentrant activation checkpointing of one block, for classes with and without a switch for it."""
    forward = block.forward

    def recompute(*args: Any, **kwargs: Any) -> Tensor:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    block.forward = recompute


@by_default(RESOLUTIONS)
def test_second_resolution_costs_at_most_one_compile(case: Case) -> None:
    model = converted(case)
    recorder = Recorder({"lowering": "eager"})
    compiled = torch.compile(model, backend=recorder, fullgraph=case.fullgraph)
    graphs = []
    for resolution in (0, 1, 0, 1):
        inputs = case.inputs(resolution)
        expected = run(model, inputs, case.output, gradients=False)
        actual = run(compiled, inputs, case.output, parameters=model, gradients=False)
        assert relative_error(actual.output, expected.output) <= 1e-5
        graphs.append(recorder.graphs)
    assert graphs[-1] == graphs[1], "going back to a known resolution compiled something"
    if case.fullgraph:
        assert graphs[-1] <= 2


@every_case
def test_saved_and_loaded(case: Case, tmp_path: Path) -> None:
    model, inputs = converted(case), case.inputs(0)
    expected = run(model, inputs, case.output, gradients=False)
    file = salad_compile.save(model, tmp_path / "salad.safetensors")
    loaded = salad_compile.load(case.build(), file, grid=case.grid)
    actual = run(loaded, inputs, case.output, gradients=False)
    assert torch.equal(actual.output, expected.output)
