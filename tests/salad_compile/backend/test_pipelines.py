"""compile_pipeline, and a Wan2.2 pipeline of two experts from conversion to a compiled, half dense run."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import salad_compile
from salad_compile.backend.dynamo import record_graphs
from salad_compile.backend.pipelines import compile_pipeline
from salad_compile.errors import ConfigError, NotConvertedError
from salad_compile.sites.branch import branches
from tests.models.zoo import CASES, WAN, from_diffusers, randomise
from tests.support import TINY, converted, randomise_branches, relative_error, seeded
from tests.trainers.tiny import INPUTS, base, generate, pipeline

EAGER: dict[str, Any] = {"fullgraph": True, "options": {"lowering": "eager"}}


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def experts() -> Any:
    """Wan2.2's two, the second for timesteps below 500."""
    with seeded(11):
        second = randomise(from_diffusers("WanTransformer3DModel", WAN), 11).eval()
    return pipeline(base(), second, boundary_ratio=0.5)


def test_two_experts_from_conversion_to_a_compiled_run(tmp_path: Path) -> None:
    pipe = salad_compile.convert(experts(), TINY, example_inputs=dict(INPUTS))
    for seed, expert in enumerate((pipe.transformer, pipe.transformer_2)):
        randomise_branches(expert, seed)
        salad_compile.save(expert, tmp_path / f"{seed}.safetensors")
    with salad_compile.dense(pipe):
        always_dense = generate(pipe, steps=4)
    uncompiled, expected = (
        generate(pipe, steps=4),
        generate(pipe, 4, callback_on_step_end=salad_compile.DenseSteps(pipe, 1)),
    )
    assert relative_error(expected, uncompiled) > 1e-3
    assert relative_error(expected, always_dense) > 1e-3

    other = experts()
    salad_compile.load(other.transformer, tmp_path / "0.safetensors")
    salad_compile.load(other.transformer_2, tmp_path / "1.safetensors")
    with record_graphs() as graphs:
        assert compile_pipeline(other, **EAGER) is other
        assert relative_error(generate(other, steps=4), uncompiled) < 1e-5
        with salad_compile.dense(other):
            assert relative_error(generate(other, steps=4), always_dense) < 1e-5
    assert [graph.count("salad") for graph in graphs if graph.count("salad")] == [1]  # four blocks of two models
    with torch._dynamo.config.patch(error_on_recompile=True):
        compile_pipeline(other, **EAGER)
        steps = salad_compile.DenseSteps(other, 1)
        assert relative_error(generate(other, 4, callback_on_step_end=steps), expected) < 1e-5
        salad_compile.set_dense(other, False)
        assert relative_error(generate(other, steps=4), uncompiled) < 1e-5
    # each file belongs to its expert: their bases are alike in structure, and only the numbers tell
    assert all(
        torch.equal(a.gate_weight, b.gate_weight)
        for name in ("transformer", "transformer_2")
        for a, b in zip(branches(getattr(pipe, name)).values(), branches(getattr(other, name)).values(), strict=True)
    )


def test_an_expert_that_is_not_converted_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    pipe = experts()
    pipe.transformer = converted(CASES["Wan"])
    expected = generate(pipe)
    with caplog.at_level(logging.INFO, "salad_compile"):
        compile_pipeline(pipe, **EAGER)
    assert "transformer_2 is not converted" in caplog.text
    assert "transformer: 2 sites, compiled block by block" in caplog.text
    with record_graphs() as graphs:
        assert relative_error(generate(pipe), expected) < 1e-5
    assert [graph.count("salad") for graph in graphs] == [1]


def test_a_model_without_named_blocks_is_compiled_whole(caplog: pytest.LogCaptureFixture) -> None:
    case = CASES["handwritten_fused"]
    model = converted(case)
    expected = case.output(model(**case.inputs(0)))
    with caplog.at_level(logging.INFO, "salad_compile"), record_graphs() as graphs:
        compile_pipeline(model, **EAGER)
        assert relative_error(case.output(model(**case.inputs(0))), expected) < 1e-5
    assert "compiled whole" in caplog.text
    assert [graph.count("salad") for graph in graphs] == [2]


def test_what_was_never_converted_is_an_error() -> None:
    pipe = experts()
    with pytest.raises(NotConvertedError, match="convert"):
        compile_pipeline(pipe)
    with pytest.raises(ConfigError):
        compile_pipeline(object())


def test_wrong_options_are_an_error_before_the_first_run() -> None:
    with pytest.raises(ConfigError, match=r"unknown option 'lowring'.* Did you mean 'lowering'"):
        compile_pipeline(base(), options={"lowring": "eager"})
