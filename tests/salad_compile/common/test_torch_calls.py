"""Names and arguments of calls that modes and graphs show."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from salad_compile.common.torch_calls import argument_of, name_of


@pytest.mark.parametrize(
    ("function", "args", "expected"),
    [
        (F.softmax, (), ("softmax", False)),
        (torch.Tensor.softmax, (), ("softmax", False)),
        ("softmax", (), ("softmax", False)),
        (torch.ops.aten.softmax.int, (), ("softmax", False)),
        (operator.truediv, (), ("div", False)),
        (torch.Tensor.__rmul__, (), ("mul", False)),
        (torch.Tensor.mul_, (), ("mul", True)),
        (torch.ops.aten.copy_.default, (), ("copy", True)),
        (operator.setitem, (), ("setitem", True)),
        (torch.Tensor.mT.__get__, (), ("mT", False)),
        (getattr, (None, "mT"), ("mT", False)),
    ],
)
def test_what_does_the_same_has_one_name(function: Any, args: tuple[Any, ...], expected: tuple[str, bool]) -> None:
    assert name_of(function, args) == expected


@pytest.mark.parametrize(
    ("args", "kwargs", "expected"),
    [
        (("x", 1), {}, 1),
        (("x",), {"dim": 2}, 2),
        (("x",), {"axis": 3}, 3),
        (("x",), {}, 0),
        (("x",), {"dim": None}, None),
    ],
)
def test_arguments_by_place_and_by_either_name(args: Any, kwargs: dict[str, Any], expected: Any) -> None:
    assert argument_of(args, kwargs, 1, "dim", 0) == expected
