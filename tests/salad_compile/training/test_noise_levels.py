"""Which noise levels are drawn and how much they count, against diffusers' own functions."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from salad_compile.errors import ConfigError
from salad_compile.latents import LatentItem
from salad_compile.training.families.cogvideox import CogVideoX
from salad_compile.training.flow_matching import training_sample, validation_sample
from salad_compile.training.noise_levels import SMALLEST, loss_weight, shift_level
from salad_compile.training.settings import LOSS_WEIGHTINGS, LossWeighting, TrainSettings
from tests.models.registry import ALL_CASES
from tests.salad_compile.training.tiny import SETTINGS, latents

SMALL = LatentItem("small", torch.zeros(1, 1, 1, 1), torch.zeros(1, 1))


@pytest.mark.parametrize("sampling", ["uniform", "logit-normal"])
def test_noise_levels_are_distributed_as_asked_for(sampling: str) -> None:
    settings = dataclasses.replace(SETTINGS, timestep_sampling=sampling, logit_mean=-1.0, logit_std=0.5, flow_shift=3.0)
    levels = torch.stack([training_sample(SMALL, settings, step, 0).timesteps[0] / 1000 for step in range(2000)])
    u = levels / (3 - 2 * levels)  # the shift, undone
    drawn = u if sampling == "uniform" else (torch.logit(u) + 1) / 0.5
    mean, deviation = (0.5, 12**-0.5) if sampling == "uniform" else (0.0, 1.0)
    assert abs(float(drawn.mean()) - mean) < 5 * deviation / 2000**0.5  # five standard errors
    assert float(drawn.std()) == pytest.approx(deviation, rel=0.1)


@pytest.mark.parametrize("sampling", ["uniform", "logit-normal", "mode"])
def test_an_expert_is_given_its_own_noise_alone(sampling: str) -> None:
    """Together the two experts are given what one model is given."""
    whole = dataclasses.replace(SETTINGS, timestep_sampling=sampling, logit_mean=0.4, logit_std=0.8, flow_shift=3.0)

    def levels(settings: TrainSettings) -> torch.Tensor:
        drawn = [training_sample(SMALL, settings, step, 0).timesteps[0] for step in range(2000)]
        seen = [validation_sample(SMALL, settings, 0, point).timesteps[0] for point in range(4)]
        assert settings.lowest_noise < min(seen) / 1000 < max(seen) / 1000 < settings.highest_noise
        return torch.stack(drawn) / 1000

    everything = levels(whole)
    high = levels(dataclasses.replace(whole, lowest_noise=0.875))
    low = levels(dataclasses.replace(whole, highest_noise=0.875))
    assert high.min() >= 0.875 - 1e-6
    assert high.max() <= 1
    assert low.max() <= 0.875 + 1e-6
    for found, of in ((high, everything[everything >= 0.875]), (low, everything[everything < 0.875])):
        error = 5 * (found.std() ** 2 / len(found) + of.std() ** 2 / len(of)) ** 0.5
        assert abs(float(found.mean() - of.mean())) < error
    for wrong in ({"lowest_noise": 0.9, "highest_noise": 0.5}, {"lowest_noise": 1.0}, {"highest_noise": 1.5}):
        with pytest.raises(ConfigError, match="_noise must be"):
            dataclasses.replace(whole, **wrong)


def test_shift_keeps_the_ends_and_raises_the_middle() -> None:
    assert [shift_level(u, 5.0) for u in (0.0, 0.5, 1.0)] == pytest.approx([0.0, 5 / 6, 1.0])


@pytest.mark.parametrize("scale", [1.29, -0.9])
def test_mode_is_that_of_diffusers(scale: float) -> None:
    from diffusers.training_utils import compute_density_for_timestep_sampling

    settings = dataclasses.replace(SETTINGS, timestep_sampling="mode", mode_scale=scale, flow_shift=1.0)
    drawn = torch.cat([training_sample(SMALL, settings, step, 0).timesteps / 1000 for step in range(2000)])
    theirs = compute_density_for_timestep_sampling("mode", 200_000, mode_scale=scale)  # type: ignore[no-untyped-call]
    for level in (0.1, 0.25, 0.5, 0.75, 0.9):
        share = float((theirs < level).float().mean())
        error = (share * (1 - share) / 2000) ** 0.5
        assert abs(float((drawn < level).float().mean()) - share) < 5 * error


@pytest.mark.parametrize("weighting", LOSS_WEIGHTINGS)
def test_weights_are_those_of_diffusers(weighting: LossWeighting) -> None:
    from diffusers.training_utils import compute_loss_weighting_for_sd3

    levels = torch.tensor([SMALLEST, 0.1, 0.5, 0.9, 1.0], dtype=torch.float64)
    theirs = compute_loss_weighting_for_sd3(weighting, levels)  # type: ignore[no-untyped-call]
    ours = torch.tensor([loss_weight(float(s), weighting) for s in levels], dtype=torch.float64)
    torch.testing.assert_close(ours, theirs.double(), rtol=1e-6, atol=0)
    assert loss_weight(0.0, weighting) == loss_weight(SMALLEST, weighting) or weighting == "cosmap"


def test_a_training_sample_has_the_weight_of_its_level_and_a_validation_sample_none() -> None:
    settings = dataclasses.replace(SETTINGS, loss_weighting="cosmap")
    for step in range(5):
        sample = training_sample(SMALL, settings, step, 1)
        level = float(sample.timesteps) / 1000
        assert float(sample.weights) == pytest.approx(loss_weight(level, "cosmap"), rel=1e-5)
    assert not len(validation_sample(SMALL, settings, 0, 0).weights)


def test_a_model_that_is_no_flow_has_no_weighting(tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, loss_weighting="sigma_sqrt")
    family = CogVideoX(ALL_CASES["CogVideoX"].build(), settings)
    with pytest.raises(ConfigError, match="loss_weighting weighs noise levels of flow matching"):
        family.check(latents(tmp_path / "latents"))
