"""A second conversion asks for what is there, or is an error that says what differs."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, nn

import salad_compile
from salad_compile.errors import AlreadyConvertedError
from salad_compile.sites.branch import branches
from tests import toys
from tests.support import TINY

INPUTS = (toys.tokens(100),)


def stack() -> nn.Module:
    return toys.Stack(toys.SelfAttention(), toys.SelfAttention())


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(x)
        return result


def convert(model: nn.Module, sites: Any = None) -> nn.Module:
    return salad_compile.convert(model, TINY, example_inputs=INPUTS, sites=sites)


@pytest.mark.parametrize("sites", ["layers.0", ["!layers.1"], None])
def test_the_same_sites_change_nothing(sites: Any) -> None:
    model = convert(stack(), "layers.0")
    before = list(branches(model).values())
    assert list(branches(convert(model, sites)).values()) == before


def test_other_sites_are_named() -> None:
    model = convert(stack(), "layers.0")
    with pytest.raises(AlreadyConvertedError, match=r"'layers\.1' asked for now.*'layers\.0' converted before"):
        convert(model, "layers.1")
    assert list(branches(model)) == ["layers.0.salad"]


def test_a_part_or_a_model_around_is_named() -> None:
    outer = Around(convert(stack()))
    with pytest.raises(AlreadyConvertedError, match=r"Around.*its part 'inner' was"):
        convert(outer)
    converted = convert(Around(stack()))
    assert isinstance(converted, Around)
    with pytest.raises(AlreadyConvertedError, match=r"Stack.*a model around it was"):
        convert(converted.inner)
