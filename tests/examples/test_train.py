"""A training that was killed ends with the weights of one that was not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

Load = Callable[[str], ModuleType]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def train(load: Load) -> ModuleType:
    return load("train")


def new_training(load: Load, **recipe: Any) -> Any:
    torch.manual_seed(0)
    preset = load("presets").TINY
    model = load("model").VideoDiT(preset.model)
    given = {"steps": 5, "clips": 3, **recipe}
    return load("train").Training(model, dataclasses.replace(preset.dense, **given)), model


def test_resuming_gives_the_same_weights(train: ModuleType, load: Load, tmp_path: Path) -> None:
    size = load("presets").TINY.model.clip
    whole, model = new_training(load)
    train.train(whole, model, size, CPU, title="whole")
    kept = tmp_path / "kept.pt"
    killed, model = new_training(load)
    train.train(killed, model, size, CPU, title="killed", checkpoint=kept, stop_after=2)
    resumed, model = new_training(load)
    train.train(resumed, model, size, CPU, title="resumed", checkpoint=kept)
    assert (killed.step, resumed.step) == (2, 5)
    for name, value in whole.trained.items():
        assert torch.equal(value, resumed.trained[name])
        assert torch.equal(whole.mean[name], resumed.mean[name])


def test_a_checkpoint_of_another_recipe_is_refused(train: ModuleType, load: Load, tmp_path: Path) -> None:
    first, _ = new_training(load)
    first.save(tmp_path / "kept.pt")
    other, _ = new_training(load, rate=0.5)
    with pytest.raises(ValueError, match="another recipe"):
        other.load(tmp_path / "kept.pt")


def test_batches_are_the_fixed_clips_pass_after_pass(train: ModuleType, load: Load) -> None:
    preset = load("presets").TINY
    recipe = dataclasses.replace(preset.tune, steps=4, batch=2, clips=4)
    batches = train.Batches(recipe, preset.model.clip, CPU)
    first = torch.cat([batches[0][0], batches[1][0]])
    second = torch.cat([batches[2][0], batches[3][0]])
    distances = torch.cdist(first.flatten(1), second.flatten(1))
    assert sorted(distances.argmin(1).tolist()) == [0, 1, 2, 3]  # the same four clips
    assert float(distances.amin(1).max()) < 0.1
    assert torch.equal(batches[1][2], train.Batches(recipe, preset.model.clip, CPU)[1][2])


def test_the_rate_rises_and_falls(load: Load) -> None:
    recipe = load("train").Recipe(steps=100, batch=1, rate=1.0, warm_up=10)
    rates = [recipe.rate_at(step) for step in range(100)]
    assert rates.index(max(rates)) in (9, 10)
    assert rates[-1] < 0.01


def test_a_frozen_model_is_an_error(train: ModuleType, load: Load) -> None:
    preset = load("presets").TINY
    model = load("model").VideoDiT(preset.model).requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable"):
        train.Training(model, preset.tune)
