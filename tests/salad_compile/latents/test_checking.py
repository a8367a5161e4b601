"""Statistics over a dataset, and which mistakes of normalisation they show."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from salad_compile.latents import WAN_2_1, open_latents, write_latents
from salad_compile.latents.checking import THRESHOLD, Measured, _distance, check, doubt, evenly_spaced
from tests.salad_compile.latents.data import make_item, make_items

ZERO, ONE = (0.0,) * 16, (1.0,) * 16
RAW = Measured(WAN_2_1.mean, WAN_2_1.std, 8)
TWICE = Measured(
    tuple(-mean / std for mean, std in zip(WAN_2_1.mean, WAN_2_1.std, strict=True)),
    tuple(1 / std for std in WAN_2_1.std),
    8,
)


def test_measured_is_over_all_elements(tmp_path: Path) -> None:
    items = [make_item(0), make_item(1, (16, 3, 8, 8))]
    write_latents(items, tmp_path)
    measured = check(open_latents(tmp_path)).measured
    assert measured is not None
    whole = torch.cat([item.latent.flatten(1) for item in items], dim=1).double()
    assert measured.items == 2
    assert torch.allclose(torch.tensor(measured.mean, dtype=torch.float64), whole.mean(dim=1))
    assert torch.allclose(torch.tensor(measured.std, dtype=torch.float64), whole.std(dim=1, correction=0))


def asked(mean: tuple[float, ...], std: tuple[float, ...], *, stored: bool = True, wan: bool = True) -> str | None:
    return doubt(Measured(mean, std, 8), WAN_2_1 if wan else None, stored_normalized=stored)


def test_the_threshold_lies_below_both_mistakes() -> None:
    assert _distance(RAW, ZERO, ONE) == pytest.approx(1.02, abs=0.005)
    assert _distance(TWICE, ZERO, ONE) == pytest.approx(0.86, abs=0.005)
    assert math.log(2) == THRESHOLD < 0.86
    assert asked((0.0,) * 4, (2.01,) * 4, wan=False) is not None
    assert asked((0.0,) * 4, (1.99,) * 4, wan=False) is None
    assert asked((0.0,) * 4, (0.49,) * 4, wan=False) is not None
    assert asked((0.0,) * 4, (0.51,) * 4, wan=False) is None


@pytest.mark.parametrize("wan", [True, False])
def test_mistakes_are_told_apart(wan: bool) -> None:
    never, twice, neither = "not normalised (", "normalised twice (", "do not look normalised"
    assert f"{never}pass normalized=False)" in (asked(RAW.mean, RAW.std, wan=wan) or "")
    assert f"{never}the VAE's statistics do not fit)" in (asked(RAW.mean, RAW.std, stored=False, wan=wan) or "")
    assert f"{twice}what wrote them?)" in (asked(TWICE.mean, TWICE.std, wan=wan) or "")
    assert f"{twice}pass normalized=True)" in (asked(TWICE.mean, TWICE.std, stored=False, wan=wan) or "")
    assert neither in (asked((9.0,) * 16, ONE, wan=wan) or "")
    assert neither in (asked(ZERO, (0.0, *ONE[1:]), wan=wan) or "")
    assert asked(ZERO, ONE, wan=wan) is None


def test_few_clips_are_not_the_whole_training_set() -> None:
    # a third calmer or livelier than most in every channel, and each channel with a mean of its own
    for std in (0.65, 1.5):
        assert asked((0.3, -0.3) * 8, (std,) * 16) is None


def test_a_sample_is_spread_out_and_has_no_index_twice(tmp_path: Path) -> None:
    assert evenly_spaced(4, 100) == [0, 25, 50, 75]
    assert evenly_spaced(8, 3) == [0, 1, 2]
    assert evenly_spaced(0, 3) == evenly_spaced(3, 0) == []
    write_latents(make_items(4), tmp_path)
    latents = open_latents(tmp_path)
    measured = check(latents, [1, 3]).measured
    assert measured is not None
    assert measured.items == 2
    assert check(latents, []).measured is None
