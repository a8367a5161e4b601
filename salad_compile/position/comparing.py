"""The comparison of a call's arguments with known ones, written as one expression of Python.

A loop over the arguments takes three times as long, and an uncompiled forward makes a comparison for every operation.
The expression holds numbers and names alone: what came from the model is read by a name, and never becomes text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from salad_compile.position.recording import UNCOUNTED

# (tensors by number, their first versions, positional arguments, keyword arguments, key of a value, whether it is new)
Comparison: TypeAlias = (
    "Callable[[list[Tensor], list[int], tuple[Any, ...], dict[str, Any], Callable[..., Any], Callable[..., Any]], bool]"
)

CONSTANTS = frozenset(
    {
        *(int, float, bool, str, type(None), type(...)),
        *(torch.dtype, torch.device, torch.layout, torch.memory_format),
    }
)


def is_known(key: Any) -> bool:
    """Whether this is what a tensor is compared by that was seen before."""
    return type(key) is tuple and len(key) == 2 and type(key[0]) is int


def comparison(arguments: Sequence[Any], keywords: Any) -> Comparison:
    """Whether a call's arguments are compared by these.

    Args:
        arguments: what the positional ones are compared by, see `SeenTensors._key`.
        keywords: (dict, (name, key), ...), or None where there are none.
    """
    writing = _Writing()
    places = [(f"args[{at}]", key) for at, key in enumerate(arguments)]
    parts = [f"len(args) == {len(arguments)}", "not kwargs"]
    if keywords is not None:
        names = tuple(name for name, _ in keywords[1:])
        parts[1] = f"tuple(kwargs) == {writing.name(names)}"
        places += [(f"kwargs[{writing.name(name)}]", key) for name, key in keywords[1:]]
    parts += [writing.test(place, key) for place, key in places]
    text = f"lambda tensors, first, args, kwargs, key_of, is_new: {' and '.join(parts)}"
    compared: Comparison = eval(text, {"__builtins__": {}, **_WORDS, **writing.values})
    return compared


_WORDS = {word.__name__: word for word in (bool, int, len, slice, tuple, type)}
_SINGLE: dict[Any, str] = {None: "None", ...: "...", True: "True", False: "False"}


class _Writing:
    """Writes tests of single arguments, and names the values that they read."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def name(self, value: Any) -> str:
        """A name by which the expression reads a value."""
        name = f"value{len(self.values)}"
        self.values[name] = value
        return name

    def test(self, place: str, key: Any) -> str:
        """Whether what stands at a place is compared by `key`."""
        if is_known(key):
            number, writes = key
            version = f"first[{number}] == {UNCOUNTED} or {place}._version - first[{number}] == {writes}"
            return f"tensors[{number}] is {place} and ({version})"
        if type(key[0]) is int:
            return f"is_new({place}, {self.name(key)})"
        if len(key) == 2 and key[0] in CONSTANTS and key[0] is not float:
            return self._constant(place, *key)
        if key[0] is tuple and all(_is_place(part) for part in key[1:]):
            parts = [f"type({place}) is tuple and len({place}) == {len(key) - 1}"]
            parts += [self._place(f"{place}[{at}]", *part) for at, part in enumerate(key[1:])]
            return " and ".join(parts)
        return f"key_of({place}) == {self.name(key)}"

    def _place(self, place: str, kind: Any, *key: Any) -> str:
        """A part of an index."""
        if kind is not slice:
            return self._constant(place, kind, key[0])
        bounds = zip(("start", "stop", "step"), key, strict=True)
        parts = [self._constant(f"{place}.{name}", *bound) for name, bound in bounds]
        return f"type({place}) is slice and {' and '.join(parts)}"

    def _constant(self, place: str, kind: Any, value: Any) -> str:
        """0 and False are equal, so types are compared as well."""
        if kind in (bool, type(None), type(...)):
            return f"{place} is {_SINGLE[value]}"
        if kind is int:
            return f"type({place}) is int and {place} == {value}"
        return f"type({place}) is {self.name(kind)} and {place} == {self.name(value)}"


def _is_place(key: Any) -> bool:
    """Whether this is what a part of an index is compared by, without a tensor."""
    if key[0] is slice:
        return all(bound[0] in (int, type(None)) for bound in key[1:])
    return key[0] in (int, bool, type(None), type(...))
