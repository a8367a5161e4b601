"""Image-to-video Wan is trained on what its own pipeline gives it."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import salad_compile
from salad_compile.errors import ConfigError, LatentItemError
from salad_compile.latents import LatentItem, open_latents, write_latents
from salad_compile.latents.conditions import conditions_of
from salad_compile.sites.branch import branches
from salad_compile.training import read_log, train
from salad_compile.training.families.wan import Wan
from salad_compile.training.flow_matching import Noised, predict, stack, training_sample
from tests.salad_compile.latents.encoding import families
from tests.salad_compile.training import tiny
from tests.salad_compile.training.first_frame import encoded, given_by, prepare

SETTINGS = replace(tiny.SETTINGS, steps=2, batch=2, micro_batch=1, text_tokens=12, text_dropout=0.0)


@functools.cache
def pipeline(features: bool) -> Any:
    pipe = families.build(families.wan_image if features else families.wan_image_without_features)
    return prepare(pipe)


@functools.cache
def item(features: bool, seed: int = 0) -> LatentItem:
    return encoded(pipeline(features), seed, 16.0)


@pytest.mark.parametrize("features", [True, False])
def test_the_transformer_is_given_what_its_pipeline_gives_it(features: bool) -> None:
    pipe = pipeline(features)
    expected = given_by(pipe, SETTINGS.text_tokens)
    noisy, clip = expected["hidden_states"][:, :16], item(features)
    sample = stack([training_sample(clip, SETTINGS, 0, 0)])
    torch.testing.assert_close(
        sample.conditions["latents_image"], expected["hidden_states"][:, 16:], rtol=1e-4, atol=1e-4
    )
    batch = Noised(noisy, expected["timestep"].float(), sample.texts, noisy, sample.conditions)
    family = Wan(pipe.transformer, SETTINGS)
    with torch.no_grad():
        mine = family.predict(pipe.transformer, batch)
        theirs = pipe.transformer(**expected)[0]
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
    if features:
        with torch.no_grad():
            without = family.predict(
                pipe.transformer,
                replace(batch, conditions={**batch.conditions, "clip_feature": batch.conditions["clip_feature"] * 0}),
            )
        assert not torch.allclose(without, theirs, rtol=1e-3, atol=1e-4)


def test_a_run_on_data_with_conditions(tmp_path: Path) -> None:
    write_latents([item(True, seed) for seed in range(2)], tmp_path / "data")
    data = open_latents(tmp_path / "data", sample=0)
    model = families.build(families.wan_image).transformer
    result = train(model, data, SETTINGS, tmp_path / "run", config={**tiny.CONFIG.to_dict(), "min_tokens": 16})
    assert result.finished
    assert len([line for line in read_log(tmp_path / "run") if "loss" in line]) == 2
    assert salad_compile.load(families.build(families.wan_image).transformer, tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"first_frame_latent": None},
            "takes 20 channels beside those of the latents, and 'clip0' has no latents_image",
        ),
        ({"clip_feature": None}, "takes 8 features of an image as wide, and 'clip0' has no clip_feature"),
        ({"clip_feature": torch.zeros(5, 6)}, "and 'clip0' has 6: make the data with the pipeline of this model"),
        ({"latents_image": torch.zeros(16, 3, 8, 12)}, "and 'clip0' has 16"),
    ],
)
def test_data_without_conditions_are_refused(tmp_path: Path, change: dict[str, Tensor | None], message: str) -> None:
    clip = item(True)
    extras = {name: tensor for name, tensor in {**clip.extras, **change}.items() if tensor is not None}
    write_latents([replace(clip, extras=extras)], tmp_path / "data")
    data = open_latents(tmp_path / "data", sample=0)
    model = families.build(families.wan_image).transformer
    with pytest.raises(ConfigError, match=message):
        train(model, data, replace(SETTINGS, batch=1), tmp_path / "run", config=tiny.CONFIG)
    assert not branches(model)


def test_forwards_of_ones_own_get_conditions_if_they_ask() -> None:
    sample = training_sample(item(True), SETTINGS, 0, 0)
    seen: list[Any] = []

    def four(model: Any, latents: Tensor, timesteps: Tensor, texts: Tensor) -> Tensor:
        return latents

    def five(model: Any, latents: Tensor, timesteps: Tensor, texts: Tensor, conditions: Any) -> Tensor:
        seen.append(sorted(conditions))
        return latents

    for forward in (four, five):
        predict(forward, torch.nn.Identity(), sample)
    assert seen == [["clip_feature", "latents_image"]]
    other = replace(item(True), extras={"latents_image": torch.zeros(20, 1, 8, 12)})
    with pytest.raises(LatentItemError, match=r"clip0: its latents_image is \(20, 1, 8, 12\), and the latent"):
        conditions_of(other)
