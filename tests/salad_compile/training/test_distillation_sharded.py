"""Distillation under FSDP2 on two processes: the gradients of one, sharded, however the model was divided."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import salad_compile
from salad_compile.errors import WrappedModelError
from salad_compile.training.distillation import SiteDistillation
from salad_compile.training.engine import Engine
from salad_compile.training.preparation import make_trainable
from salad_compile.training.tensors import trained_parameters
from tests import support
from tests.models.registry import ALL_CASES
from tests.models.zoo import Case
from tests.salad_compile.training.tiny import SETTINGS
from tests.support import relative_error
from tests.trainers.processes import WORLD, in_two_processes

BOUND = {"fp32": 1e-5, "bf16": 2.0**-6}  # of the gradients; activations in bf16 are rounded at 2^-9


def nothing(model: nn.Module, case: Case) -> Iterator[nn.Module]:
    """The root alone, which does not shard again after a forward."""
    yield from ()


def blocks(model: nn.Module, case: Case) -> Iterator[nn.Module]:
    yield from (model.get_submodule(name) for name in case.repeated_blocks)


def attention(model: nn.Module, case: Case) -> Iterator[nn.Module]:
    yield from (model.get_submodule(name) for name in case.sites)
    yield from blocks(model, case)


def projections(model: nn.Module, case: Case) -> Iterator[nn.Module]:
    yield from (model.get_submodule(case.projections[role]) for role in ("query", "out"))


Layout = Callable[[nn.Module, Case], Iterator[nn.Module]]
LAYOUTS: tuple[Layout, ...] = (nothing, blocks, attention, projections)


def distil(model: nn.Module, inputs: list[dict[str, Any]]) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean of the losses, and the gradients of this process."""
    distillation = SiteDistillation(model, scale=1 / len(inputs))
    found = []
    for sample in inputs:
        distillation.errors.clear()
        with distillation.watching():
            model(**sample)
        found.append(distillation.losses().mean())
    return torch.stack(found).mean(), distillation.take_gradients()


def worker(rank: int, folder: Path, name: str, precision: str, layouts: tuple[Layout, ...]) -> None:
    case = ALL_CASES[name]
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    inputs = [cast(case.inputs(number), dtype) for number in range(WORLD)]  # of two lengths
    model = support.converted(case)
    make_trainable(model, precision)
    _, expected = distil(model, inputs)
    own, _ = distil(model, [inputs[rank]])
    for layout in layouts:
        model = support.converted(case)
        make_trainable(model, precision)
        for part in layout(model, case):
            fully_shard(part)
        fully_shard(model)
        for _ in range(2):  # the second one begins where the first one ended
            loss, gradients = distil(model, [inputs[rank]])
            torch.testing.assert_close(loss, own)
        accelerator: Any = SimpleNamespace(is_fsdp2=True, num_processes=WORLD)
        engine = Engine(accelerator, SETTINGS, model, model, None)
        engine.set_gradients(gradients)
        actual = trained_parameters(model)
        assert {key for key, parameter in actual.items() if parameter.grad is not None} == expected.keys()
        for key, wanted in expected.items():
            parameter = actual[key]
            assert isinstance(parameter.grad, DTensor)
            assert parameter.grad.placements == parameter.placements  # type: ignore[attr-defined]
            assert relative_error(parameter.grad.full_tensor(), wanted) < BOUND[precision], (layout, key)
        with torch.no_grad():
            model(**inputs[rank])
        assert all(isinstance(parameter, DTensor) for parameter in engine.parameters.values())
    unconverted = fully_shard(case.build().to(dtype))
    unconverted(**inputs[rank])  # whose parameters are whole afterwards
    with pytest.raises(WrappedModelError, match="sharded already"):
        salad_compile.convert(unconverted, support.TINY, example_inputs=inputs[rank], grid=case.grid)


def cast(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


@pytest.mark.parametrize(
    ("name", "precision", "layouts"),
    [
        ("Wan", "fp32", LAYOUTS),
        pytest.param("Wan", "bf16", LAYOUTS, marks=pytest.mark.all_cases),
        *(
            pytest.param(name, "fp32", (blocks,), marks=pytest.mark.all_cases)
            for name in ("HunyuanVideo", "CogVideoX", "LTXVideo")
        ),
    ],
)
def test_gradients_are_those_of_one_process(
    tmp_path: Path, name: str, precision: str, layouts: tuple[Layout, ...]
) -> None:
    in_two_processes(functools.partial(worker, name=name, precision=precision, layouts=layouts), tmp_path)
