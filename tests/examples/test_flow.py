"""The loss, the sampler and the likeness of clips, on models whose answer is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

Load = Callable[[str], ModuleType]
SHAPE = (2, 3, 4, 16, 16)


@pytest.fixture(scope="module")
def flow(load: Load) -> ModuleType:
    return load("flow")


def test_the_loss_of_the_true_flow_is_zero(flow: ModuleType) -> None:
    clips, noise, labels = torch.rand(SHAPE), torch.randn(SHAPE), torch.zeros(2, dtype=torch.int64)
    losses = flow.flow_losses(lambda x, level, label: noise - clips, clips, labels, noise, torch.tensor([0.2, 0.9]))
    assert losses.tolist() == [0, 0]


def test_the_sampler_arrives_from_any_level(flow: ModuleType) -> None:
    clips, noise, labels = torch.rand(SHAPE), torch.randn(SHAPE), torch.zeros(2, dtype=torch.int64)

    def exact(x: Tensor, level: Tensor, label: Tensor) -> Tensor:
        return noise - clips

    for level in (1.0, 0.6):
        torch.testing.assert_close(flow.sample(exact, clips + level * (noise - clips), labels, 5, level), clips)
    with pytest.raises(ValueError, match="1 step or more"):
        flow.sample(exact, noise, labels, 0)


def test_held_out_triples_are_fixed_and_cover_all_levels(flow: ModuleType, load: Load) -> None:
    size = load("videos").ClipSize(4, 16)
    first, second = (flow.held_out_triples(10, size, torch.device("cpu")) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    assert sorted(first.level.tolist()) == pytest.approx([(n + 0.5) / 10 for n in range(10)])
    mean, by_level = flow.held_out_loss(lambda x, level, label: torch.zeros_like(x), first, 3)
    assert mean == pytest.approx(sum(by_level) / flow.BINS, rel=1e-5)


def test_likeness(flow: ModuleType) -> None:
    clip = torch.rand(SHAPE) - 0.5
    assert flow.psnr(clip + 0.02, clip) == pytest.approx(10 * math.log10(4 / 0.02**2), rel=1e-3)
    assert flow.ssim(clip, clip) == pytest.approx(1)
    assert flow.ssim(torch.rand(SHAPE) - 0.5, clip) < 0.5
