"""Rotary position as PyTorch computes it, while a SALAD model runs.

Since 2026 ComfyUI rotates queries and keys by one operator of its own kernels. SALAD's feature maps read them before
the rotation and repeat it afterwards, for which it must be seen.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch.nn as nn
from torch import Tensor

NAME = "apply_rope1"  # as ComfyUI's models import it from comfy.ldm.flux.math
_lock = threading.Lock()
_replaced: dict[ModuleType, tuple[Any, int]] = {}  # what was there, and how many forwards run without it


def rotate(x: Tensor, matrices: Tensor) -> Tensor:
    """What ComfyUI's function of that name returns.

    Args:
        x: (B, S, H, D), pairs of neighbouring channels. matrices: (1 or B, S, 1, D / 2, 2, 2), of their rotations.
    """
    pairs = x.to(matrices.dtype).unflatten(-1, (-1, 1, 2))
    return (matrices[..., 0] * pairs[..., 0] + matrices[..., 1] * pairs[..., 1]).flatten(-2).type_as(x)


def enter(model: nn.Module) -> None:
    """Let the modules that define the model's layers rotate by :func:`rotate`, until as many :func:`leave`."""
    with _lock:
        for module in _modules(model):
            original, count = _replaced.get(module, (getattr(module, NAME), 0))
            _replaced[module] = original, count + 1
            setattr(module, NAME, rotate)


def leave(model: nn.Module) -> None:
    with _lock:
        for module in _modules(model):
            if module not in _replaced:
                continue  # of a layer that came in the meantime
            original, count = _replaced.pop(module)
            if count > 1:
                _replaced[module] = original, count - 1
            else:
                setattr(module, NAME, original)


@contextlib.contextmanager
def plain_rotation(model: nn.Module) -> Iterator[None]:
    enter(model)
    try:
        yield
    finally:
        leave(model)


def _modules(model: nn.Module) -> list[ModuleType]:
    names = {cls.__module__ for layer in model.modules() for cls in type(layer).__mro__}
    return [sys.modules[name] for name in sorted(names) if hasattr(sys.modules.get(name), NAME)]
