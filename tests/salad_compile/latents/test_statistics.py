"""Mean and standard deviation of a VAE: the constants, and what is computed with them."""

from __future__ import annotations

import inspect

import pytest
import torch
from diffusers import AutoencoderKLWan

from salad_compile.errors import ConfigError
from salad_compile.latents import WAN_2_1, LatentStatistics


def test_wan_constants_are_those_of_diffusers() -> None:
    defaults = inspect.signature(AutoencoderKLWan.__init__).parameters
    assert list(WAN_2_1.mean) == list(defaults["latents_mean"].default)
    assert list(WAN_2_1.std) == list(defaults["latents_std"].default)


def test_normalize_is_mean_then_std_per_channel() -> None:
    statistics = LatentStatistics((1.0, -2.0), (2.0, 4.0))
    latent = torch.tensor([3.0, 6.0]).view(2, 1, 1, 1).expand(2, 3, 4, 5)
    expected = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1).expand(2, 3, 4, 5)
    assert torch.equal(statistics.normalize(latent), expected)
    assert torch.equal(statistics.denormalize(expected), latent)


def test_there_and_back_costs_one_rounding_each_way() -> None:
    latent = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    stored = WAN_2_1.denormalize(latent)
    back = WAN_2_1.normalize(stored)
    # half a unit in the last place of the stored value, divided by std, and half of one of the result
    std = torch.tensor(WAN_2_1.std).view(-1, 1, 1, 1)
    bound = 2.0**-24 * (stored.abs() / std + back.abs()) * 1.01
    assert ((back - latent).abs() <= bound).all()
    assert not torch.equal(stored, latent)


@pytest.mark.parametrize(
    ("mean", "std"),
    [((0.0,), (1.0, 1.0)), ((), ()), ((0.0,), (0.0,)), ((0.0,), (-1.0,)), ((float("nan"),), (1.0,))],
)
def test_what_cannot_be_is_an_error(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="LatentStatistics needs"):
        LatentStatistics(mean, std)
