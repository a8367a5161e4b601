"""From which inputs of a model each token of a value was computed: labels, one bit for each input.

Followed as rows are (position/rows.py), from the inputs of a forward up to its projections, and not through attention:
what attention returns has the labels of its queries. Whatever may mix tokens of several labels makes them unknown, and
an operation that no mode sees makes what it returns unknown, which is not to be taken for anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Private; seen in torch 2.11 and 2.13 (tests/salad_compile/position/test_private_names.py).
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils.weak import WeakIdKeyDictionary

from salad_compile.common.torch_calls import name_of
from salad_compile.position.kept_rows import Entries, Operation
from salad_compile.position.row_reader import Rows, leaves
from salad_compile.position.rows import RowTracker, values_of_tensors
from salad_compile.position.shadows import blank, compact, shrink

_INPUTS = 30
"""So many inputs have bits of their own; further ones share the last."""
_POSSIBLE = 30
"""By how much the bits of inputs that a token may come from stand higher than those of inputs that it comes from."""


class _Labels(Entries):
    """Labels are sets of inputs: what is combined has those of all."""

    blank = 0

    def merge(self, one: Tensor, other: Tensor) -> Tensor:
        """Entry by entry, of two shadows that can be broadcast."""
        return one | other

    def reduce(self, shadow: Tensor, axes: Sequence[int]) -> Tensor:
        """Of all entries along some axes, which stay, with one entry each."""
        for axis in axes:
            parts = shadow.unbind(axis)
            if len(parts) > 1:
                unique = torch.unique(shadow).tolist()
                result = torch.zeros_like(parts[0])
                for label in unique:
                    result = torch.where((shadow == label).any(axis), result | label, result)
                shadow = result.unsqueeze(axis)
        return shadow

    def convolve(self, shadow: Tensor, operation: Operation) -> Tensor:
        """Each place has the labels of all that its window reads, over all channels."""
        axes = int(operation.name[4])
        names = ("input", "weight", "bias", "stride", "padding", "dilation")
        given = {**dict(zip(names, operation.args, strict=False)), **operation.kwargs}
        window = torch.ones(1, 1, *given["weight"].shape[2:])
        settings = {name: given[name] for name in names[3:] if name in given}
        shadow = self.reduce(compact(shadow), [shadow.dim() - axes - 1]).expand(
            *shadow.shape[: -axes - 1], 1, *shadow.shape[-axes:]
        )
        result = torch.zeros((), dtype=torch.int64)
        for label in torch.unique(shadow).tolist():
            reads = _CONVOLUTIONS[axes]((shadow == label).float(), window, **settings) > 0
            result = result | torch.where(reads, label, 0)
        return result


_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class TokenLabels(RowTracker):
    """The labels of all values of one forward.

    Attributes:
        names: of the inputs, by bit. reason: why labels are unknown, the first of several reasons.
    """

    def __init__(self) -> None:
        super().__init__(WeakIdKeyDictionary(), values_of_tensors(), _Labels())
        self.names: list[str] = []
        self.reason = ""

    def start(self, inputs: Mapping[str, Iterable[Tensor]]) -> None:
        """The inputs of the forward by name."""
        for name, tensors in inputs.items():
            label = 1 << min(len(self.names), _INPUTS - 1)
            self.names.append(name)
            for tensor in tensors:
                self._label(tensor, label)

    def note(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        """The next operation."""
        for value in leaves((args, kwargs)):
            if isinstance(value, Tensor):
                self._require_label(value)
        super().note(function, args, kwargs, out)
        name, _ = name_of(function, args)
        for value in self._tensors(out):
            if "empty" in name:
                self._label(value, self._anything())  # until it is written into, where that can be seen
            elif value not in self.table:
                self._label(value, 0)

    def keep(self, out: Tensor, source: Tensor) -> None:
        """`out` has the tokens of `source`, (..., C), whatever computed it; unless its shape is another one."""
        with unset_fake_temporarily():
            if out.shape[:-1] == source.shape[:-1]:
                labels = self.of_tokens(source).view(*out.shape[:-1], 1)
                self.table[out] = Rows(shrink(labels).expand(out.shape))
                return
        self.note(_computed, (source,), {}, out)

    def of_tokens(self, value: Tensor) -> Tensor:
        """The label of each row of (..., C), flattened: of all its channels."""
        self._require_label(value)
        known = self.table[value].shadow
        with unset_fake_temporarily():
            shadow = blank(value.shape, self._anything()) if known is None else known.expand(value.shape)
            labels: Tensor = self.entries.reduce(compact(shadow[..., None]), [-2])[..., 0]
            return labels.expand(*value.shape[:-1], 1)[..., 0].reshape(-1)

    def names_of(self, labels: Tensor, *, certain: bool = False) -> set[str]:
        """The inputs from which tokens with these labels may come, or come for certain."""
        if not certain:
            labels = labels | labels >> _POSSIBLE
        return {name for at, name in enumerate(self.names) if bool((labels & (1 << min(at, _INPUTS - 1))).any())}

    def _label(self, value: Tensor, label: int) -> None:
        with unset_fake_temporarily():
            self.table[value] = Rows(blank(value.shape, label))

    def _require_label(self, value: Tensor) -> None:
        """Parameters and constants come from no input; what has a history that was not seen may come from any."""
        if value not in self.table:
            self._label(value, 0 if value.grad_fn is None else self._anything())

    def _anything(self) -> int:
        return (1 << min(len(self.names), _INPUTS)) - 1 << _POSSIBLE

    def _lost(self, reason: str, value: Any, inputs: Sequence[Any]) -> Rows:
        """What is mixed of several labels has what all of them have, and possibly the rest."""
        known = [self.table[given].shadow for given in inputs if given in self.table]
        found = {int(label) for shadow in known if shadow is not None for label in torch.unique(compact(shadow))}
        found |= {self._anything()} if any(shadow is None for shadow in known) else set()
        label = found.pop() if len(found) == 1 else 0
        if found:
            self.reason = self.reason or reason
            certain, possible = _ALL, 0
            for other in found:
                certain &= other
                possible |= other & _ALL | other >> _POSSIBLE
            label = certain | possible << _POSSIBLE
        return Rows(blank(tuple(value.shape), label))


_ALL = (1 << _INPUTS) - 1


def _computed(value: Any) -> Any:
    raise NotImplementedError  # stands for an unknown operation
