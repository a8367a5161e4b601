"""What operations of an uncompiled forward are compared by, see sequences.py.

An edge is a tuple that names an operation. Where a sequence went on before, the operation that comes is compared with
the one that came then, argument by argument: that takes a third of the time that making and hashing an edge does.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
import torch.nn as nn
from torch import Tensor

from salad_compile.position.again import Autocast, autocast_state
from salad_compile.position.operations import writes
from salad_compile.position.recording import UNCOUNTED

_CONSTANTS = frozenset(
    {
        *(int, float, bool, str, type(None), type(...)),
        *(torch.dtype, torch.device, torch.layout, torch.memory_format),
    }
)

Sequence = TypeVar("Sequence")


class UnknownArgumentError(Exception):
    """An argument that cannot be compared."""


class KnownArguments:
    """A function and its arguments, taken apart.

    Attributes:
        func: the function.
        arguments: of each tensor that was known (number, writes, None), of each constant that is no float (_CONSTANT,
            type, value), of numbers and slices in a tuple (_PLACES, 0, keys), of each other one (_OTHER, 0, key).
        keywords: what keyword arguments are compared by, None if there are none.
        seen: how many tensors were seen before.
    """

    __slots__ = ("arguments", "func", "keywords", "seen")

    def __init__(self, key: tuple[Any, ...], seen: int) -> None:
        self.seen = seen
        self.func, *arguments, self.keywords = key
        self.arguments = [_taken_apart(key) for key in arguments]


class KnownStep(KnownArguments, Generic[Sequence]):
    """An operation with which a sequence went on, taken apart.

    Attributes:
        edge: (function and arguments, result, autocast), as `SeenTensors` makes them, and what it consists of.
        is_new: whether the result is one new tensor.
        is_plain: whether there are no keyword arguments, and the function writes into nothing.
        following: the sequence with this operation.
    """

    __slots__ = ("autocast", "edge", "following", "is_new", "is_plain", "result")

    def __init__(self, edge: tuple[Any, Any, Autocast | None], seen: int, following: Sequence) -> None:
        self.edge = edge
        arguments, self.result, self.autocast = edge
        super().__init__(arguments, seen)
        self.is_new = type(self.result[0]) is int and not _is_known(self.result)
        self.is_plain = self.keywords is None and not may_write(self.func)
        self.following = following


def _is_known(key: Any) -> bool:
    """Whether this is what a tensor is compared by that was seen before."""
    return len(key) == 2 and type(key[0]) is int


_CONSTANT, _PLACES, _OTHER = -1, -2, -3


def _taken_apart(key: Any) -> tuple[int, Any, Any]:
    if _is_known(key):
        return (*key, None)
    if len(key) == 2 and key[0] in _CONSTANTS and key[0] is not float:
        return (_CONSTANT, *key)
    if key[0] is tuple and all(_is_place(part) for part in key[1:]):
        return (_PLACES, 0, key[1:])
    return (_OTHER, 0, key)


def _is_place(key: Any) -> bool:
    """Whether this is what a part of an index is compared by, without a tensor."""
    if key[0] is slice:
        return all(bound[0] in (int, type(None)) for bound in key[1:])
    return key[0] in (int, bool, type(None), type(...))


def _are_places(index: tuple[Any, ...], wanted: tuple[Any, ...]) -> bool:
    """Whether an index is compared by these."""
    if len(index) != len(wanted):
        return False
    for place, (kind, *key) in zip(index, wanted, strict=True):
        if type(place) is not kind:
            return False
        if kind is not slice:
            if place != key[0]:
                return False
            continue
        for bound, (bound_kind, number) in zip((place.start, place.stop, place.step), key, strict=True):
            if type(bound) is not bound_kind or bound != number:
                return False
    return True


@functools.lru_cache(maxsize=4096)
def _writes_whatever(func: Callable[..., Any]) -> bool:
    return writes(func, (), {})


def may_write(func: Callable[..., Any]) -> bool:
    """Whether a function writes into its arguments, unless `out` is among them."""
    try:
        return _writes_whatever(func)
    except TypeError:  # some callables cannot be hashed
        return writes(func, (), {})


class SeenTensors:
    """The tensors of one forward, numbered by when they were first seen, and the edges that are made of them."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []  # kept alive: the id of a freed tensor would be reused
        self._numbers: dict[int, int] = {}  # id -> place in `_tensors`
        self._first_versions: list[int] = []
        self._storages: dict[int, int] = {}
        self._versions: dict[int, int] = {}  # of the tensors of the edge that is being made, by id
        self._unread: dict[int, int] = {}  # in its place where an edge is compared

    # ------------------------------------------------------------------------------------------------ making edges

    def _arguments(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The function and its arguments. Raises UnknownArgumentError."""
        numbers, first, versions = self._numbers, self._first_versions, self._versions
        key: list[Any] = [func]
        for value in args:
            identity = id(value)
            number = numbers.get(identity)
            if number is None:
                key.append(self._key(value))
                continue
            before = first[number]
            versions[identity] = version = before if before == UNCOUNTED else value._version
            key.append((number, version - before))
        key.append(self._key(kwargs) if kwargs else None)
        return tuple(key)

    def _key(self, value: Any) -> Any:
        """What an argument is compared by. Raises UnknownArgumentError."""
        kind = type(value)
        if kind is not Tensor:
            if kind in _CONSTANTS:
                # 0.0 and -0.0 are equal
                return (kind, value) if value or kind is not float else (kind, math.copysign(1.0, value))
            if kind is tuple or kind is list:
                return (kind, *[self._key(entry) for entry in value])
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, (tuple, list)):
            return (kind, *map(self._key, value))
        if kind is slice:
            return (kind, self._key(value.start), self._key(value.stop), self._key(value.step))
        if kind is dict:
            return (kind, *((name, self._key(entry)) for name, entry in value.items()))
        raise UnknownArgumentError

    def _tensor(self, tensor: Tensor) -> tuple[Any, ...]:
        identity = id(tensor)
        number = self._numbers.get(identity)
        try:
            version = tensor._version
        except RuntimeError:  # of inference mode
            version = UNCOUNTED
        self._versions[identity] = version
        if number is not None:
            return (number, version - self._first_versions[number])
        self._numbers[identity] = number = len(self._tensors)
        self._tensors.append(tensor)
        self._first_versions.append(version)
        # exactly a tensor: no parameter, and the check for parameters is slow
        parameter = type(tensor) is not Tensor and isinstance(tensor, nn.Parameter)
        return (number, tensor.shape, tensor.dtype, self._storage(tensor), parameter, version != UNCOUNTED)

    def _storage(self, tensor: Tensor) -> int | None:
        """A number that only tensors of one memory share, in the order in which memories are met."""
        try:
            storage = tensor.untyped_storage()._cdata  # see `TensorInfo.of`
        except (RuntimeError, NotImplementedError):
            return None
        return self._storages.setdefault(storage, len(self._storages))

    def _result(self, out: Any) -> Any:
        if isinstance(out, Tensor):
            known = id(out) in self._numbers  # of operations in place, some of which change the shape
            return (self._tensor(out), out.shape, out.dtype) if known else self._tensor(out)
        if isinstance(out, (tuple, list)):
            return (type(out), *[self._result(part) for part in out])
        return self._key(out)

    # ------------------------------------------------------------------------------------ comparing with what is known

    def _fits(self, known: KnownArguments, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether arguments of its function are the known ones. Notes the tensors if they are."""
        if len(args) != len(known.arguments):
            return False
        self._versions, tensors, first = self._unread, self._tensors, self._first_versions
        try:
            for value, (number, wanted, key) in zip(args, known.arguments, strict=True):
                if number >= 0:
                    if tensors[number] is not value:
                        break
                    before = first[number]
                    if before != UNCOUNTED and value._version - before != wanted:
                        break
                elif number == _CONSTANT:
                    if type(value) is not wanted or value != key:
                        break
                elif number == _PLACES:
                    if type(value) is not tuple or not _are_places(value, key):
                        break
                elif self._key(value) != key:
                    break
            else:
                if (self._key(kwargs) if kwargs else None) == known.keywords:
                    return True
        except UnknownArgumentError:
            pass
        self._forget_since(known.seen)
        return False

    def _repeats(self, known: KnownStep[Any], args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> bool:
        """Whether a call of the function of a known step is this step. Notes the tensors if it is."""
        if not self._fits(known, args, kwargs):
            return False
        try:
            if self._is_result(known, out):
                return True
        except UnknownArgumentError:
            pass
        self._forget_since(known.seen)
        return False

    def _is_result(self, known: KnownStep[Any], out: Any) -> bool:
        if not known.is_new or type(out) is not Tensor:
            return bool(self._result(out) == known.result) and autocast_state(out) == known.autocast
        number, shape, dtype, wanted, parameter, counted = known.result
        identity, storages = id(out), self._storages
        if out.shape != shape or out.dtype is not dtype or identity in self._numbers or parameter:
            return False
        try:
            version = out._version
        except RuntimeError:  # of inference mode
            version = UNCOUNTED
        self._numbers[identity] = number
        self._tensors.append(out)
        self._first_versions.append(version)
        try:
            storage = storages.setdefault(out.untyped_storage()._cdata, len(storages))  # as `_storage` has it
        except (RuntimeError, NotImplementedError):
            return False
        if storage != wanted or (version != UNCOUNTED) is not counted:
            return False
        if known.autocast is None:
            return autocast_state(out) is None
        device, on, narrow = known.autocast
        if not (out.is_cpu if device == "cpu" else out.device.type == device):
            return False
        # where it is off, its dtype does nothing
        return torch.is_autocast_enabled(device) is on and (not on or torch.get_autocast_dtype(device) == narrow)

    def _forget_since(self, count: int) -> None:
        """Forget all tensors but the first `count`. Memories stay, and are met in the same order again."""
        for tensor in self._tensors[count:]:
            del self._numbers[id(tensor)]
        del self._tensors[count:], self._first_versions[count:]

    def _versions_in(self, key: Any) -> dict[int, int]:
        """id of each tensor in an edge -> how many writes torch had counted when it was made."""
        if not isinstance(key, tuple) or not key or isinstance(key, torch.Size):
            return {}
        if type(key[0]) is int:
            number = key[0]
            writes = key[1] if _is_known(key) else 0
            return {id(self._tensors[number]): self._first_versions[number] + writes}
        versions: dict[int, int] = {}
        for part in key:
            versions.update(self._versions_in(part))
        return versions
