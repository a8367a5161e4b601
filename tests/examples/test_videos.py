"""Clips are a function of (seed, index); what is hidden comes back as it was; what leaves the picture returns."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch

Load = Callable[[str], ModuleType]


@pytest.fixture(scope="module")
def videos(load: Load) -> ModuleType:
    return load("videos")


def test_a_clip_depends_on_seed_and_index_alone(videos: ModuleType) -> None:
    size = videos.ClipSize()
    together = videos.draw(7, torch.arange(4), size)
    alone = videos.draw(7, torch.tensor([2]), size)
    for many, one in zip(together, alone, strict=True):
        assert torch.equal(many[2:3], one)
    assert not torch.equal(videos.draw(8, torch.tensor([2]), size).video, alone.video)
    assert not torch.equal(together.video[0], together.video[1])


def test_pixels_and_labels_are_in_range(videos: ModuleType) -> None:
    clips = videos.draw(1, torch.arange(24), videos.ClipSize(frames=8, edge=32))
    assert clips.video.shape == (24, 3, 8, 32, 32)
    assert clips.video.dtype == torch.float32
    assert float(clips.video.abs().max()) <= 1
    assert clips.labels.unique().numel() > 4
    assert int(clips.labels.max()) < len(videos.SHAPES)


def test_the_hidden_sprite_comes_back_with_the_same_texture(videos: ModuleType) -> None:
    clips = videos.draw(3, torch.arange(6), videos.ClipSize())
    for clip, passing, light in zip(clips.video, clips.passing, clips.light, strict=True):
        seen = (passing >= 0).flatten(1).sum(1)
        hidden = (seen == 0).nonzero().flatten()
        assert len(hidden) > 0
        before, after = int(hidden[0]) - 4, int(hidden[-1]) + 4
        colours = [texture(clip - light.T[:, :, None, None], passing, frame) for frame in (before, after)]
        shared = colours[0].keys() & colours[1].keys()
        assert len(shared) > 10
        for place in shared:
            torch.testing.assert_close(colours[0][place], colours[1][place])


def texture(clip: torch.Tensor, passing: torch.Tensor, frame: int) -> dict[int, torch.Tensor]:
    """Position in the sprite's texture -> its colour in one frame; clip is (3, T, S, S) without its light."""
    where = (passing[frame] >= 0).nonzero()
    return {int(passing[frame, y, x]): clip[:, frame, y, x] for y, x in where}


def test_the_background_returns_and_is_found_elsewhere_in_between(videos: ModuleType) -> None:
    key, time = torch.arange(8) + 5, torch.arange(16)
    camera = videos._camera(key, time)
    moved = camera - camera[:, :1]
    assert bool((moved % videos.PATCH == 0).all())
    assert bool((moved.abs().amax((1, 2)) >= videos.PATCH).all())
    background = videos._background(key, time, 64)
    for clip in range(len(key)):
        again = [t for t in range(8, 16) if torch.equal(camera[clip, t], camera[clip, 4])]
        assert any(torch.equal(background[clip, t], background[clip, 4]) for t in again)
        dy, dx = (int(step) for step in camera[clip, 3] - camera[clip, 0])
        then, now = background[clip, 0], background[clip, 3].roll((dy, dx), (0, 1))
        rows = slice(max(dy, 0), 64 + min(dy, 0))
        columns = slice(max(dx, 0), 64 + min(dx, 0))
        assert torch.equal(then[rows, columns], now[rows, columns])


def test_wrong_sizes_and_indices_are_errors(videos: ModuleType) -> None:
    with pytest.raises(ValueError, match="multiple of 16"):
        videos.ClipSize(edge=40)
    with pytest.raises(ValueError, match="int64"):
        videos.draw(1, torch.zeros(2), videos.ClipSize())
