"""Running operations of an uncompiled forward once more, with other values, under the autocast that they had."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from salad_compile.position.flow import TensorInfo
from salad_compile.position.slice import Entry, PositionSlice, features

# device type, whether it is on, its dtype
Autocast: TypeAlias = "tuple[str, bool, torch.dtype]"


def replay(
    found: PositionSlice | None,
    operand: Tensor,
    feature_map: str,
    start_of: Callable[[Entry], Tensor],
    value_of: Callable[[fx.Node], Tensor],
) -> tuple[Tensor, Tensor]:
    """An operand without position, and its features with it.

    Args:
        start_of: the value at the start of a stream. value_of: what else is needed, of a node's tensor.
    """
    if found is None:
        info = TensorInfo.of(operand)
        assert info is not None
        return operand, features(operand, info, operand.shape[-1], feature_map)
    plain, rotated = found.replay(
        lambda entry: entry.begin(start_of(entry), feature_map), lambda node, known: run_again(node, known, value_of)
    )
    return plain, rotated


def run_again(node: fx.Node, known: Mapping[fx.Node, Any], value_of: Callable[[fx.Node], Tensor]) -> Any:
    """Run an operation once more, with other values for some of its arguments."""

    def value(argument: fx.Node) -> Any:
        return known[argument] if argument in known else value_of(argument)

    target: Any = node.target
    with under(node.meta.get("autocast")):
        return target(*fx.map_arg(node.args, value), **fx.map_arg(dict(node.kwargs), value))


def under(state: Autocast | None) -> contextlib.AbstractContextManager[Any]:
    """Autocast in this state."""
    if state is None or is_on(state):
        return contextlib.nullcontext()
    device, on, dtype = state
    return torch.autocast(device, enabled=on, dtype=dtype)


def is_on(state: Autocast) -> bool:
    """Whether autocast is in this state. Where it is off, its dtype does nothing."""
    device, on, dtype = state
    return torch.is_autocast_enabled(device) is on and (not on or torch.get_autocast_dtype(device) == dtype)


def autocast_state(out: Any) -> Autocast | None:
    """What autocast does on the device of a result; None if there is none for it."""
    if not isinstance(out, Tensor):
        tensors = [part for part in out if isinstance(part, Tensor)] if isinstance(out, (tuple, list)) else []
        return autocast_state(tensors[0]) if tensors else None
    device = out.device.type
    if not _has_autocast(device):
        return None
    return device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


@functools.cache
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)
