"""The grid behind wrapped forwards, of other configurations, from sizes among the arguments; never from channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor

import salad_compile
from salad_compile import SaladConfig
from salad_compile.common.signatures import argument_names
from salad_compile.discovery.discover import Discovery, discover
from salad_compile.grid.rule import GridRule
from tests import toys

CONFIG = SaladConfig(compensation="none", query_block=16, key_block=16, lora_rank=0, min_tokens=40)


class Video(nn.Module):
    """Patches of (1, 2, 2) through one attention module."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.patch = nn.Conv3d(channels, toys.WIDTH, (1, 2, 2), (1, 2, 2))
        self.reference = nn.Conv2d(channels, toys.WIDTH, 2, 2)
        self.attention = toys.SelfAttention()

    def forward(self, video: Tensor, scale: float = 1.0) -> Tensor:
        out: Tensor = self.attention(self.patch(video).flatten(2).transpose(1, 2) * scale)
        return out


def hidden(forward: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    return wrapper


class Wrapped(Video):
    forward = hidden(hidden(Video.forward))


class Positions(Video):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(*args, **kwargs)


class WithReference(Video):
    """A frame more than the video has: its channels happen to be as many."""

    def forward(self, video: Tensor, image: Tensor) -> Tensor:
        first, rest = self.reference(image).flatten(2), self.patch(video).flatten(2)
        out: Tensor = self.attention(torch.cat([first, rest], 2).transpose(1, 2))
        return out


class Patchified(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = toys.SelfAttention()

    def forward(self, x: Tensor, thw: tuple[int, int, int]) -> Tensor:
        out: Tensor = self.attention(x)
        return out


def found(model: nn.Module, inputs: Any) -> Discovery:
    return discover(model, inputs, min_tokens=40)


def test_a_wrapped_forward_shows_the_names_of_the_one_that_it_calls() -> None:
    assert argument_names(Wrapped().forward) == argument_names(Video().forward) == ("video", "scale")
    rule = found(Wrapped(), {"video": torch.randn(1, 4, 3, 8, 12)}).grid
    assert rule == GridRule("latent", ("video",), (2, 3, 4), (1, 2, 2))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("model", [Wrapped, Positions])
def test_a_wrapped_forward_gets_its_order_in_every_call(model: type[Video], compiled: bool) -> None:
    run: Any = model()
    salad_compile.convert(run, CONFIG, example_inputs=(torch.randn(1, 4, 3, 8, 12),))
    assert run.attention.salad.record.on_grid
    if compiled:
        torch._dynamo.reset()
        run = torch.compile(run, backend="salad", options={"lowering": "eager"})
    assert run(torch.randn(1, 4, 5, 8, 12)).shape[1] == 5 * 4 * 6  # without its order, or with another: an error


@pytest.mark.parametrize(("channels", "frames"), [(4, 3), (16, 15)])
def test_channels_are_never_frames(channels: int, frames: int) -> None:
    inputs = torch.randn(1, channels, frames, 8, 12), torch.randn(1, channels, 8, 12)
    discovery = found(WithReference(channels), inputs)
    assert discovery.grid is None
    assert "(1, 3, 4)" not in discovery.grid_reason


def test_sizes_among_the_arguments_are_the_grid() -> None:
    tokens = toys.tokens(72)
    assert found(Patchified(), (tokens, (3, 4, 6))).grid == GridRule("sizes", ("thw",), patch=(1, 1, 1))
    assert found(Patchified(), (tokens, (3, 4, 7))).grid is None


def test_patches_may_have_other_names() -> None:
    class Spatial(Patchified):
        patch_spatial, patch_temporal = 2, 1

    rule = found(Spatial(), (toys.tokens(72), (3, 8, 12))).grid
    assert rule == GridRule("sizes", ("thw",), patch=(1, 2, 2))
    assert isinstance(rule, GridRule)
    assert GridRule.from_dict(rule.to_dict()) == rule
