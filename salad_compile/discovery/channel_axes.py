"""Which axis of a video input is the channels: the one that convolutions read as such."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

# Private; seen in torch 2.11 and 2.13 (tests/salad_compile/position/test_private_names.py).
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils.weak import WeakIdKeyDictionary

from salad_compile.position.rows import RowTracker, of_tensors


class ChannelAxes:
    """Follows the 5-D inputs of one forward up to the convolutions that read them.

    Attributes:
        channels: name of an input -> its axis, counted as in a tensor with a batch axis.
    """

    def __init__(self) -> None:
        self.channels: dict[str, int] = {}
        self._tracker: RowTracker = of_tensors(WeakIdKeyDictionary())
        self._inputs: list[tuple[str, int, Sequence[int]]] = []  # name, its first row, its axes but the last

    def start(self, inputs: Mapping[str, Any]) -> None:
        """The inputs of the forward by name; lists of videos without a batch axis among them."""
        for name, given in inputs.items():
            first = given[0] if isinstance(given, (tuple, list)) and given else given
            if isinstance(first, Tensor) and first.dim() in (4, 5) and first.is_floating_point():
                self._inputs.append((name, self._tracker.add_source(first), tuple(first.shape[:-1])))

    def note(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """An operation of the model ran, before the first attention call."""
        if self._inputs:
            self._tracker.note(func, args, kwargs, out)

    def read_by_convolution(self, value: Tensor) -> None:
        """A convolution reads a value, (B, C, ...)."""
        known = self._tracker.table.get(value)
        if known is None or known.shadow is None or value.dim() < 4:
            return
        with unset_fake_temporarily():
            steps = known.shadow[0].flatten(1)[:, 0].tolist()
        for name, first, sizes in self._inputs:
            own = [row - first for row in steps if first <= row < first + _product(sizes)]
            varying = [axis for axis in range(len(sizes)) if len({_coordinate(row, sizes, axis) for row in own}) > 1]
            if len(varying) == 1:
                self.channels[name] = varying[0] + 4 - len(sizes)  # without a batch axis, count one


def _coordinate(row: int, sizes: Sequence[int], axis: int) -> int:
    return row // _product(sizes[axis + 1 :]) % sizes[axis]


def _product(sizes: Sequence[int]) -> int:
    return math.prod(sizes)
