"""Which channels of a projection a value is made of, through views, joins along the batch and what is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

# Private; see discovery/channels.py.
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from salad_compile.discovery.channels import ChannelTracker

WIDTH = 12


class Following(TorchFunctionMode):
    def __init__(self, tracker: ChannelTracker) -> None:
        super().__init__()
        self.tracker = tracker

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.tracker.note(func, args, kwargs or {}, out)
        return out


def follow(function: Callable[..., Tensor], sources: int = 1) -> tuple[ChannelTracker, Tensor]:
    tracker = ChannelTracker()
    with FakeTensorMode():
        values = [torch.randn(2, 5, WIDTH) for _ in range(sources)]
        for number, value in enumerate(values):
            tracker.add_source(number, value)
        with Following(tracker):
            return tracker, function(*values)


@pytest.mark.parametrize(
    ("function", "span"),
    [
        (lambda x: x[..., 4:8], (4, 8)),
        (lambda x: x.split([3, 5, 4], -1)[1].unflatten(-1, (1, 5)).transpose(1, 2), (3, 8)),
        (lambda x: x.view(2, 5, 3, 4).permute(2, 0, 1, 3)[1] * 2 + 1, (4, 8)),
        (lambda x: torch.nn.functional.layer_norm(x[..., :4], (4,)), (0, 4)),
        (lambda x: x.reshape(2, 5, 3, 2, 2).unbind(2)[2].contiguous().flatten(2), (8, 12)),
        (lambda x: (x * 2)[..., :4], (0, 12)),  # computed of the whole, as far as this sees
        (lambda x: x[..., ::2], None),  # no one run
        (lambda x: x.view(2, 5, 2, 3, 2)[:, :, :, 0], None),  # heads first: two runs
        (lambda x: torch.cat([x[..., 0:2], x[..., 2:4].neg()], -1), (0, 4)),
    ],
)
def test_span(function: Callable[[Tensor], Tensor], span: tuple[int, int] | None) -> None:
    tracker, value = follow(function)
    assert tracker.span(value, 0) == span


def written(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    joined = torch.cat([a, b, c])
    joined[:4] = joined[:4].cos() * 2
    return joined


@pytest.mark.parametrize(
    ("function", "sources"),
    [
        (lambda a, b, c: torch.cat([a, b, c]).chunk(3)[1], {1}),
        (lambda a, b, c: torch.stack([a, b, c]).mul(2).unbind(0)[2], {2}),
        (lambda a, b, c: written(a, b, c)[2:4], {1}),
        (lambda a, b, c: written(a, b, c)[4:], {2}),
        (lambda a, b, c: torch.cat([a, b, c])[1:3], {0, 1}),
        (lambda a, b, c: torch.cat([a, b, c]).flip(0)[:2], {0, 1, 2}),  # moved: not followed
        (lambda a, b, c: torch.cat([torch.cat([a, b]), torch.cat([b, c])], dim=1)[2:], {1, 2}),
        (lambda a, b, c: torch.concatenate([torch.cat([a, b]), torch.cat([b, c])], axis=1)[2:], {1, 2}),
        (lambda a, b, c: torch.cat([a, b, c]).sum(0), {0, 1, 2}),
        (lambda a, b, c: torch.cat([a, b]).transpose(0, 1)[:, 2:], {1}),
    ],
)
def test_sources(function: Callable[..., Tensor], sources: set[int]) -> None:
    tracker, value = follow(function, 3)
    assert tracker.sources(value) == sources


def test_what_was_not_seen_is_not_known() -> None:
    tracker, _ = follow(lambda x: x)
    assert tracker.sources(torch.zeros(1)) is None
    assert tracker.span(torch.zeros(1), 0) is None
