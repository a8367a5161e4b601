"""8-bit moments: steps like AdamW's, a state that is written and read as it is, and what is said without torchao."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn

from salad_compile.errors import ConfigError, MissingPackageError
from salad_compile.training import TrainSettings, train
from salad_compile.training.optimizers import make_optimizer, set_rate
from salad_compile.training.tensors import fits_shape, optimizer_tensors, restore_optimizer
from tests.salad_compile.training.tiny import SETTINGS, converted, latents

EIGHT = dataclasses.replace(SETTINGS, optimizer="adamw8bit")


def test_without_torchao_it_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = converted(), latents(tmp_path / "data")
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(MissingPackageError, match="pip install torchao, or say optimizer"):
        train(model, data, EIGHT, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="was not tried under FSDP2"):
        make_optimizer([], EIGHT, sharded=True)
    with pytest.raises(ConfigError, match=r"optimizer must be .*adamw8bit"):
        TrainSettings(optimizer="adam8")  # type: ignore[arg-type]


def test_rates_of_torchs_own() -> None:
    optimizer = make_optimizer([nn.Parameter(torch.zeros(2))], SETTINGS, sharded=False)
    set_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5]
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
    set_rate(optimizer, 0.25)
    assert torch.equal(optimizer.param_groups[0]["lr"], torch.tensor(0.25))


def test_a_state_is_written_and_read_as_it_is() -> None:
    pytest.importorskip("torchao")
    draw = torch.Generator().manual_seed(0)

    def step(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, number: int) -> None:
        own = torch.Generator().manual_seed(number)
        for parameter in parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=own)
        optimizer.step()

    first = {"large": nn.Parameter(torch.randn(64, 128, generator=draw)), "small": nn.Parameter(torch.ones(3))}
    optimizer = make_optimizer(first.values(), EIGHT, sharded=False)
    for number in range(3):
        step(first, optimizer, number)
    stored = optimizer_tensors(optimizer, first)
    assert {name.partition("/")[0] for name in stored if name.endswith("/large")} == {
        *("step", "exp_avg.codes", "exp_avg.scale", "exp_avg_sq.codes", "exp_avg_sq.scale"),
    }
    for joined, tensor in stored.items():
        kind, _, name = joined.partition("/")
        assert tensor.is_floating_point()
        assert fits_shape(kind, tensor, first[name])
    stored = {name: tensor.clone() for name, tensor in stored.items()}
    again = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in first.items()}
    resumed = make_optimizer(again.values(), EIGHT, sharded=False)
    restore_optimizer(resumed, again, stored)
    assert all(torch.equal(again[name], parameter) for name, parameter in first.items())
    for number in range(3, 5):
        step(first, optimizer, number)
        step(again, resumed, number)
    assert all(torch.equal(again[name], parameter) for name, parameter in first.items())
    exact = {"large": nn.Parameter(torch.randn(64, 128, generator=draw.manual_seed(0)))}
    plain = make_optimizer(exact.values(), SETTINGS, sharded=False)
    for number in range(5):
        own = torch.Generator().manual_seed(number)
        exact["large"].grad = torch.randn(64, 128, generator=own)
        plain.step()
    difference = (exact["large"] - first["large"]).abs().max()
    assert difference < 0.5 * SETTINGS.learning_rate  # of five steps of about that size
