"""Which engine computes an operator: Triton kernels on CUDA, plain torch elsewhere, or the one that was asked for."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, TypeVar

import torch

from .errors import UnsupportedKernelError

Operator = TypeVar("Operator", bound=Callable[..., Any])

# Engine -> the module in an operator's folder that holds it. They are imported when first used: Triton takes a second.
ENGINES = {"triton": "cuda", "torch": "cpu", "flex": "flex"}

# A plain global and not a context variable: autograd runs backward operators on threads of its own.
_requested: list[str] = []


@contextmanager
def use_engine(name: str) -> Iterator[None]:
    """While active, operators run on the engine `name`, in eager code and inside compiled graphs alike.

    Args:
        name: "triton" (the default on CUDA), "torch" (the default elsewhere; runs on any device, also in fp64), or
            "flex": block-sparse attention through PyTorch's FlexAttention, a cross-check; other operators, which it
            does not have, stay on their default engine.

    Raises:
        UnsupportedKernelError: there is no such engine.
    """
    if name not in ENGINES:
        raise UnsupportedKernelError(f"unknown engine {name!r}; choose one of {', '.join(map(repr, ENGINES))}")
    _requested.append(name)
    try:
        yield
    finally:
        # the last of that name: contexts nest, and may ask for the same engine
        del _requested[len(_requested) - 1 - _requested[::-1].index(name)]


def engine_name(device: torch.device, available: tuple[str, ...] = ("triton", "torch")) -> str:
    """The engine for tensors on `device`, among those that the operator has.

    Raises:
        UnsupportedKernelError: the Triton engine was asked for where nothing can run it.
    """
    name = _requested[-1] if _requested and _requested[-1] in available else None
    if name is None:
        return "triton" if device.type == "cuda" else "torch"
    if name == "triton" and device.type != "cuda" and not interpreting():
        raise UnsupportedKernelError(
            f"the Triton engine was asked for, but the tensors are on {device}: move them to CUDA, or set "
            "TRITON_INTERPRET=1 before Triton is imported to interpret the kernels, slowly"
        )
    return name


def engine_for(package: str, device: torch.device, available: tuple[str, ...] = ("triton", "torch")) -> ModuleType:
    """The module that computes the operator of `package` (its `__package__`) for tensors on `device`."""
    return importlib.import_module(f".{ENGINES[engine_name(device, available)]}", package)


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


def interpreting() -> bool:
    """Whether Triton interprets kernels on the CPU, as tests do on machines without a GPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
