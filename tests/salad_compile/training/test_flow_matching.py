"""Samples, noise and loss of flow matching, and that noise belongs to step and place alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from salad_compile.errors import ConfigError
from salad_compile.training.families import family_of
from salad_compile.training.families.wan import Wan
from salad_compile.training.flow_matching import (
    losses,
    pad_text,
    stack,
    training_sample,
    validation_sample,
)
from salad_compile.training.noise_levels import shift_level
from tests.models.registry import ALL_CASES
from tests.salad_compile.training.tiny import SETTINGS, base, items

ITEM = next(iter(items(1)))


def test_noised_latents_lie_between_clean_ones_and_noise() -> None:
    sample = training_sample(ITEM, SETTINGS, 5, 2)
    s = sample.timesteps / 1000
    noise = sample.target + ITEM.latent
    torch.testing.assert_close(sample.latents, (1 - s) * ITEM.latent + s * noise)
    assert abs(float(noise.mean())) < 0.2  # 768 numbers: five standard errors
    assert abs(float(noise.std()) - 1) < 0.15


def test_noise_depends_on_seed_step_and_place() -> None:
    def drawn(seed: int, step: int, place: int) -> torch.Tensor:
        return training_sample(ITEM, dataclasses.replace(SETTINGS, seed=seed), step, place).target

    assert torch.equal(drawn(0, 5, 2), drawn(0, 5, 2))
    others = [drawn(0, 5, 2), drawn(1, 5, 2), drawn(0, 2, 5), drawn(0, 52, 2), drawn(0, 5, 22)]
    assert all(not torch.equal(a, b) for i, a in enumerate(others) for b in others[:i])


def test_texts_are_padded_and_dropped() -> None:
    padded = pad_text(ITEM, 8)
    assert torch.equal(padded[:3], ITEM.text)
    assert not padded[3:].any()
    with pytest.raises(ConfigError, match="text of 'clip0' has 3 tokens"):
        pad_text(ITEM, 2)
    dropped = [not training_sample(ITEM, SETTINGS, step, 0).texts.any() for step in range(1000)]
    assert 0.25 < sum(dropped) / 1000 < 0.35  # text_dropout is 0.3, the standard error 0.014


def test_validation_samples_are_fixed_and_keep_their_text() -> None:
    one, again = (validation_sample(ITEM, SETTINGS, 3, 1) for _ in range(2))
    assert torch.equal(one.latents, again.latents)
    assert one.texts.any()
    levels = [validation_sample(ITEM, SETTINGS, 3, point).timesteps.item() for point in range(4)]
    assert levels == pytest.approx([1000 * shift_level(u, 5.0) for u in (0.125, 0.375, 0.625, 0.875)])


def test_losses_are_those_of_each_sample_in_fp32() -> None:
    batch = stack([training_sample(ITEM, SETTINGS, 0, place) for place in range(3)])
    prediction = (batch.target + torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1, 1, 1)).bfloat16()
    found = losses(prediction, batch.target)
    assert found.dtype == torch.float32
    expected = (prediction.double() - batch.target.double()).square().flatten(1).mean(1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)  # sums of 768 fp32 terms
    torch.testing.assert_close(losses(prediction, batch.target, None, torch.tensor([1.0, 2.0, 0.5]))[1], 2 * found[1])


def test_models_that_are_not_called_as_wan_are_an_error() -> None:
    assert isinstance(family_of(base(num_layers=1), SETTINGS), Wan)

    class Other(nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return x

    with pytest.raises(ConfigError, match=r"Other takes x, t: it is not called as.*forward=f"):
        family_of(Other(), SETTINGS)
    for name, more in {
        "WanAnimate": "pose_hidden_states, face_pixel_values, motion_encode_batch_size",
        "MotifVideo": "encoder_attention_mask, image_embeds",
        "ConsisID": "id_cond, id_vit_hidden",
    }.items():
        with pytest.raises(ConfigError, match=rf"CogVideoX are, and nothing here gives it {more}\. Pass"):
            family_of(ALL_CASES[name].build(), SETTINGS)
    with pytest.raises(ConfigError, match="predicted"):
        losses(torch.zeros(1, 3, 2), torch.zeros(1, 4, 2))


def test_what_a_family_is_not_given_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """A forward of the user's gets all of it."""
    control = torch.randn_like(ITEM.latent)
    item = dataclasses.replace(ITEM, extras={"latents_control": control, "f_indices": torch.tensor([0, 300])})
    wan, own = (family_of(base(num_layers=1), SETTINGS, forward) for forward in (None, lambda *given: given[0]))
    with pytest.raises(
        ConfigError, match=r"has f_indices, places in time of its frames, which Wan\w+ is not given here"
    ):
        wan.require_used(item)
    wan.require_used(dataclasses.replace(item, extras={"latents_control": control}))
    assert "the items have latents_control, which" in caplog.text
    own.require_used(item)
    batch = own.sample(item, 0, 0).to(torch.device("cpu"), torch.bfloat16)
    assert torch.equal(batch.conditions["latents_control"][0], control.bfloat16())
    assert batch.conditions["f_indices"].tolist() == [[0, 300]]
