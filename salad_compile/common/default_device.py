"""The device of tensors that nobody gives one, where the user set it to meta."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def with_real_tensors(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Our own small tensors have values, under `with torch.device("meta")` and `torch.set_default_device("meta")` too.

    The tensors of the model stay where they are, and a branch is built where its projections are.
    """

    @functools.wraps(function)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with real_default():
            return function(*args, **kwargs)

    return run


@contextlib.contextmanager
def real_default() -> Iterator[None]:
    """The CPU as the default device if it is meta, else what it is."""
    if torch.get_default_device().type != "meta":
        yield
        return
    with torch.device("cpu"):
        yield
