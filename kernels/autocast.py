"""Keeping autocast out of operators."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Operator = TypeVar("Operator", bound=Callable[..., Any])


def without_autocast(function: Operator) -> Operator:
    """For implementations of operators: they choose their own precision, also when autocast is on around them.

    Operators of torch.library are not autocast, but what they call is. A backward that runs inside `torch.autocast`
    would get 16-bit products in the middle of its fp32 sums.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        device = args[0].device.type
        if not torch.is_autocast_enabled(device):
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return run  # type: ignore[return-value]
