"""What changes after conversion changes at once, uncompiled and compiled, and compiles nothing again."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor

import salad_compile
from salad_compile.conversion.schedules import DenseSteps, dense, ramp_sparsity, set_dense, set_sparsity
from salad_compile.errors import ConfigError, NotConvertedError
from salad_compile.kernels import measure_executions
from salad_compile.sites.branch import branches
from tests import support
from tests.models.registry import ALL_CASES
from tests.support import relative_error, run

WAN = ALL_CASES["Wan"]
INPUTS = WAN.inputs(0)


def converted(**changes: Any) -> nn.Module:
    return support.converted(WAN, **changes)


def output(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = WAN.output(model(**INPUTS))
    return out


def sparsities(model: Any) -> list[float]:
    with measure_executions() as executions:
        output(model)
    return [execution.sparsity for execution in executions]


@pytest.mark.parametrize("pattern", ["topk", "stswa"])
def test_the_sparsity_changes_without_compiling_again(pattern: str) -> None:
    model = converted(lowest_sparsity=0.0, pattern=pattern)
    fixed = {s: output(converted(sparsity=s, pattern=pattern)) for s in (0.0, 0.3, 0.7)}
    torch._dynamo.reset()
    lowering = {"topk": "aot_eager", "stswa": "eager"}[pattern]
    compiled = torch.compile(model, backend="salad", options={"lowering": lowering})
    output(compiled)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for sparsity in (0.7, 0.0, 0.3):
            set_sparsity(compiled, sparsity)
            assert relative_error(output(model), fixed[sparsity]) < 1e-6
            assert relative_error(output(compiled), fixed[sparsity]) < 1e-5
    assert relative_error(fixed[0.0], fixed[0.7]) > 1e-3


def test_a_warm_up_reaches_each_site_s_own_sparsity() -> None:
    model = converted(lowest_sparsity=0.2, overrides={"blocks.1.*": {"sparsity": 0.4}})
    measured = []
    for progress in (-1.0, 0.0, 0.5, 1.0, 2.0):
        ramp_sparsity(model, progress)
        measured.append([int(branch.permille) for branch in branches(model).values()])
    assert measured == [[800, 800], [800, 800], [550, 700], [300, 600], [300, 600]]
    few, many = sparsities(model)
    assert few > many > 0


def test_sites_by_name() -> None:
    model = converted(lowest_sparsity=0.0)
    set_sparsity(model, {"*": 0.5, "blocks.0.*": 0.0})
    assert [int(branch.permille) for branch in branches(model).values()] == [1000, 500]


def test_what_cannot_be_set_is_an_error_and_nothing_is_set() -> None:
    model = converted(lowest_sparsity=0.4)
    for wrong in (0.3, 1.0, -0.1, {"*": 0.5, "block.0": 0.5}, {"blocks.0.*": 0.5, "blocks.1.*": 0.1}):
        with pytest.raises(ConfigError):
            set_sparsity(model, wrong)
    assert [int(branch.permille) for branch in branches(model).values()] == [300, 300]
    with pytest.raises(ConfigError, match="lowest_sparsity"):
        set_sparsity(converted(), 0.5)
    with pytest.raises(NotConvertedError):
        set_sparsity(WAN.build(), 0.5)


def test_the_sparsity_of_the_moment_is_saved(tmp_path: Any) -> None:
    model = converted(lowest_sparsity=0.0)
    set_sparsity(model, 0.25)
    loaded = salad_compile.load(WAN.build(), salad_compile.save(model, tmp_path / "salad.safetensors"))
    assert torch.equal(output(loaded), output(model))


def test_dense_is_the_base_model_and_compiles_twice_at_most() -> None:
    model = converted(lora_rank=0)
    expected = output(WAN.build())
    salad = output(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="salad", options={"lowering": "eager"})
    assert relative_error(output(compiled), salad) < 1e-5
    with dense(compiled):
        assert torch.equal(output(model), expected)
        assert relative_error(output(compiled), expected) < 1e-5
    with torch._dynamo.config.patch(error_on_recompile=True):
        for on in (False, True, False):
            set_dense(compiled, on)
            assert relative_error(output(compiled), expected if on else salad) < 1e-5
    assert relative_error(salad, expected) > 1e-2


def test_dense_comes_back_after_an_error_and_trains_low_rank_updates() -> None:
    model = converted()
    salad = output(model)

    def fail() -> None:
        with dense(model):
            assert sparsities(model) == []
            gradients.update(run(model, INPUTS, WAN.output).gradients)
            raise RuntimeError("inside")

    gradients: dict[str, Tensor] = {}
    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert gradients
    assert all(name.rsplit(".", 1)[1].startswith("low_rank_") for name in gradients)
    assert torch.equal(output(model), salad)


class Pipeline:
    """Calls a model as diffusers' pipelines do, with a callback after each step."""

    def __init__(self, timesteps: list[float]) -> None:
        self.scheduler = SimpleNamespace(timesteps=torch.tensor(timesteps))

    def __call__(self, model: nn.Module, callback_on_step_end: Any) -> list[bool]:
        was_dense = []
        for step, timestep in enumerate(self.scheduler.timesteps):
            was_dense.append(not sparsities(model))
            assert callback_on_step_end(self, step, timestep, {"latents": step}) == {"latents": step}
        return was_dense


def test_the_first_steps_stay_dense_by_number_and_by_timestep() -> None:
    model, pipe = converted(), Pipeline([999.0, 750.0, 500.0, 250.0])
    by_number = DenseSteps(model, 2)
    for _ in range(2):  # a second video begins dense again
        assert pipe(model, by_number) == [True, True, False, False]
    by_timestep = DenseSteps(model, above=700.0)
    for _ in range(2):
        assert pipe(model, by_timestep) == [True, True, False, False]
    assert pipe(model, DenseSteps(model, 0)) == [False] * 4
    with pytest.raises(ConfigError):
        DenseSteps(model)
