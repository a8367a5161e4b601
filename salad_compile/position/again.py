"""Running operations of an uncompiled forward once more, with other values, under the autocast that they had."""

from __future__ import annotations

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

    call: _Call | None = node.meta.get("call")
    if call is None:
        call = node.meta["call"] = _Call(node)
    target, args, kwargs, autocast = call.target, call.args, call.kwargs, call.autocast
    if call.is_flat:
        args = tuple(
            [a if type(a) is not fx.Node else known[a] if a in known else value_of(a) for a in args]  # quicker so
        )
    else:
        args, kwargs = fx.map_arg(args, value), fx.map_arg(kwargs, value)
    if autocast is None:
        return target(*args, **kwargs)
    device, on, dtype = autocast
    if torch.is_autocast_enabled(device) is on and (not on or torch.get_autocast_dtype(device) == dtype):
        return target(*args, **kwargs)
    with torch.autocast(device, enabled=on, dtype=dtype):
        return target(*args, **kwargs)


class _Call:
    """What a node calls, taken out of it once. is_flat: no node is within a container or has a keyword."""

    __slots__ = ("args", "autocast", "is_flat", "kwargs", "target")

    def __init__(self, node: fx.Node) -> None:
        self.target: Any = node.target
        self.args: Any = node.args
        self.kwargs: Any = dict(node.kwargs)
        self.autocast: Autocast | None = node.meta.get("autocast")
        within: list[fx.Node] = []
        fx.map_arg(([a for a in node.args if not isinstance(a, fx.Node)], self.kwargs), within.append)
        self.is_flat = not within


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
