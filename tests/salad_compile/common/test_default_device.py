"""`plan`, `convert` and `load` where the default device, the model or both are on meta."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import salad_compile
from salad_compile.sites.branch import branches
from tests.support import TINY
from tests.toys import SelfAttention

META, CPU = torch.device("meta"), torch.device("cpu")


class Positions(SelfAttention):
    """Its forward makes a tensor, and gives it no device."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.arange(160.0)[:, None] * 0.01)


def build(cls: type[nn.Module], device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    with device:
        return cls()


def devices(model: nn.Module) -> set[str]:
    return {tensor.device.type for tensor in model.state_dict().values()}


@pytest.mark.parametrize("inputs", [CPU, META], ids=str)
@pytest.mark.parametrize("default", [CPU, META], ids=str)
@pytest.mark.parametrize("cls", [SelfAttention, Positions])
def test_a_model_on_meta_is_planned_and_converted_there(
    cls: type[nn.Module], default: torch.device, inputs: torch.device
) -> None:
    x = torch.randn(1, 160, 16, device=inputs)
    model = build(cls, META)
    with default:
        assert len(salad_compile.plan(model, (x,), config=TINY).eligible) == 1
        assert devices(salad_compile.convert(model, TINY, example_inputs=(x,))) == {"meta"}
    assert len(branches(model)) == 1


@pytest.mark.parametrize("cls", [SelfAttention, Positions])
def test_the_default_device_does_not_move_a_real_model(cls: type[nn.Module]) -> None:
    x, usual, model = torch.randn(1, 160, 16), build(cls, CPU), build(cls, CPU)
    salad_compile.convert(usual, TINY, example_inputs=(x,))
    with META:
        plan = salad_compile.plan(model, (x,), config=TINY)
        salad_compile.convert(model, TINY, example_inputs=(x,))
    assert len(plan.eligible) == 1
    assert devices(model) == {"cpu"}
    model.load_state_dict(usual.state_dict())  # initial low-rank factors are random
    assert torch.equal(model(x), usual(x))


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("default", [CPU, META], ids=str)
def test_a_model_on_meta_takes_the_values_of_files(tmp_path: Path, default: torch.device, converted: bool) -> None:
    x, real = torch.randn(1, 160, 16), build(SelfAttention, CPU)
    base = real.state_dict()
    salad_compile.convert(real, TINY, example_inputs=(x,))
    with torch.no_grad():
        for parameter in (p for branch in branches(real).values() for p in branch.parameters()):
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    salad_compile.save(real, tmp_path)
    model = build(SelfAttention, META)
    with default:
        if converted:
            salad_compile.convert(model, TINY, example_inputs=(x,))
        salad_compile.load(model, tmp_path)
        model.load_state_dict(base, strict=False, assign=True)
    assert torch.equal(model(x), real(x))
    trained = [{n for n, p in each.named_parameters() if p.requires_grad} for each in (model, real)]
    assert trained[0] == trained[1]


class Reads(SelfAttention):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * float(x.sum()))


def test_what_meta_cannot_run_is_an_error_of_ours() -> None:
    model = build(Reads, META)
    before = set(model.state_dict())
    with pytest.raises(salad_compile.ProbeError, match="needs real weights"), META:
        salad_compile.convert(model, TINY, example_inputs=(torch.randn(1, 160, 16, device="cpu"),))
    assert set(model.state_dict()) == before


def test_inputs_without_values_for_a_real_model_are_an_error_of_ours() -> None:
    with pytest.raises(salad_compile.ProbeError, match="Inputs belong on the device of the weights"):
        salad_compile.plan(build(SelfAttention, CPU), (torch.randn(1, 160, 16, device="meta"),), config=TINY)
