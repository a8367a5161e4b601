"""What operations of an uncompiled forward are compared by, see sequences.py.

An edge is a tuple that names an operation. Where a sequence went on before, the operation that comes is compared with
the one that came then, argument by argument: that takes a third of the time that making and hashing an edge does.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

import torch
import torch.nn as nn
from torch import Tensor

from salad_compile.position.again import Autocast, autocast_state, is_on
from salad_compile.position.comparing import CONSTANTS, Comparison, comparison, is_known
from salad_compile.position.known_results import PLAIN, heeds_autocast, is_certain
from salad_compile.position.operations import writes
from salad_compile.position.recording import UNCOUNTED

Sequence = TypeVar("Sequence")


class UnknownArgumentError(Exception):
    """An argument that cannot be compared."""


class KnownArguments:
    """A function and its arguments.

    Attributes:
        func: the function.
        arguments, keywords: what positional and keyword arguments are compared by; no keywords: None.
        compare: the comparison with them.
        seen: how many tensors were seen before.
    """

    __slots__ = ("arguments", "compare", "func", "keywords", "seen")

    def __init__(self, key: tuple[Any, ...], seen: int) -> None:
        self.seen = seen
        self.func, *self.arguments, self.keywords = key
        self.compare: Comparison = self._write_and_compare

    def _write_and_compare(self, *given: Any) -> bool:
        """The first comparison: most operations are never compared with, so none is written before."""
        self.compare = comparison(self.arguments, self.keywords)
        return self.compare(*given)


class KnownStep(KnownArguments, Generic[Sequence]):
    """An operation with which a sequence went on, compared.

    Attributes:
        edge: (function and arguments, result, autocast), as `SeenTensors` makes them, and what it consists of.
        is_new: whether the result is one new tensor.
        is_plain: whether there are no keyword arguments, and the function writes into nothing.
        following: the sequence with this operation.
        makes: which new tensors the operation returns where that follows from its arguments (known_results.py): none,
            one or several. UNCERTAIN: it does not.
        heeds_autocast: whether it follows only where autocast is as it was.
        counted: whether torch counts the writes into those.
        before: the arguments as they are before it runs. None: it writes, and they are not known.
    """

    __slots__ = (
        *("autocast", "before", "counted", "edge", "following", "heeds_autocast", "is_new", "is_plain", "makes"),
        "result",
    )

    def __init__(self, edge: tuple[Any, Any, Autocast | None], seen: int, following: Sequence) -> None:
        self.edge = edge
        arguments, self.result, self.autocast = edge
        super().__init__(arguments, seen)
        self.is_new = type(self.result[0]) is int and not is_known(self.result)
        self.is_plain = self.keywords is None and not may_write(self.func)
        self.following = following
        self.makes, self.heeds_autocast, self.counted = UNCERTAIN, False, True
        writes = may_write(self.func) or (self.keywords is not None and "out" in dict(self.keywords[1:]))
        self.before: KnownArguments | None = None if writes else self

    @property
    def is_certain(self) -> bool:
        """Whether nothing but its arguments needs to be compared."""
        return self.makes != UNCERTAIN and self.before is not None

    def is_under_its_autocast(self) -> bool:
        """Whether autocast is as it was."""
        return self.autocast is None or is_on(self.autocast)

    def trust(self, args: tuple[Any, ...], tensors: list[Tensor]) -> None:
        """Look at the result no more if it follows from these arguments. tensors: all among them."""
        if not is_certain(self.func, args, tensors):
            return
        self.heeds_autocast = heeds_autocast(self.func)
        if is_known(self.result[0]) or self.result[0] is type(None):
            self.makes = NOTHING
        elif self.is_new:
            self.makes, self.counted = ONE, self.result[5]
        elif self.result[0] in (tuple, list) and all(type(p[0]) is int and not is_known(p) for p in self.result[1:]):
            self.makes, self.counted = SEVERAL, all(part[5] for part in self.result[1:])


UNCERTAIN, NOTHING, ONE, SEVERAL = -1, 0, 1, 2


@functools.lru_cache(maxsize=4096)
def _writes_whatever(func: Callable[..., Any]) -> bool:
    return writes(func, (), {})


def may_write(func: Callable[..., Any]) -> bool:
    """Whether a function writes into its arguments, unless `out` is among them."""
    try:
        return _writes_whatever(func)
    except TypeError:  # some callables cannot be hashed
        return writes(func, (), {})


def version_of(tensor: Tensor) -> int:
    """How many writes into a tensor torch has counted; UNCOUNTED for those of inference mode."""
    try:
        return tensor._version
    except RuntimeError:
        return UNCOUNTED


def _strides(tensor: Tensor) -> tuple[int, ...] | None:
    try:
        return tensor.stride()
    except RuntimeError:  # of sparse tensors
        return None


class SeenTensors:
    """The tensors of one forward, numbered by when they were first seen, and the edges that are made of them."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []  # kept alive: the id of a freed tensor would be reused
        self._first_versions: list[int] = []
        self._versions: dict[int, int] = {}  # of the tensors of the edge that is being made, by id
        self._unread: dict[int, int] = {}  # in its place where an edge is compared
        # of the first of `_tensors`; of others where somebody asks
        self._numbered: dict[int, int] = {}  # id -> place in `_tensors`
        self._storages: dict[int, int] = {}
        self._stored = 0  # how many

    @property
    def _numbers(self) -> dict[int, int]:
        """id -> place in `_tensors`."""
        numbers = self._numbered
        for number in range(len(numbers), len(self._tensors)):
            numbers[id(self._tensors[number])] = number
        return numbers

    def _see(self, made: Iterable[Tensor]) -> bool:
        """Number several new tensors. Returns whether torch counts the writes into them."""
        for tensor in made:
            self._tensors.append(tensor)
            self._first_versions.append(version_of(tensor))
        return self._first_versions[-1] != UNCOUNTED

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
            if kind in CONSTANTS:
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
        version = version_of(tensor)
        self._versions[identity] = version
        if number is not None:
            return (number, version - self._first_versions[number])
        number = len(self._tensors)
        self._tensors.append(tensor)
        self._first_versions.append(version)
        kind: Any = type(tensor)
        kind = kind, kind is not Tensor and isinstance(tensor, nn.Parameter)  # which other types say of themselves
        storage = self._storage()
        return (number, tensor.shape, tensor.dtype, storage, kind, version != UNCOUNTED, _strides(tensor))

    def _operand(self, tensor: Tensor) -> tuple[Any, ...]:
        """:meth:`_tensor` of an operand of attention, which is among the latest that were seen."""
        tensors = self._tensors
        for number in range(len(tensors) - 1, max(-1, len(tensors) - 9), -1):
            if tensors[number] is tensor:
                self._versions[id(tensor)] = version = version_of(tensor)
                return (number, version - self._first_versions[number])
        return self._tensor(tensor)

    def _storage(self) -> int | None:
        """Of the latest tensor, a number that only tensors of one memory share, in the order in which they are met."""
        storages, number = self._storages, None
        for tensor in self._tensors[self._stored :]:
            try:
                storage = tensor.untyped_storage()._cdata  # see `TensorInfo.of`
            except (RuntimeError, NotImplementedError):
                number = None
            else:
                number = storages.get(storage)
                if number is None:
                    number = storages[storage] = len(storages)
        self._stored = len(self._tensors)
        return number

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
        self._versions = self._unread
        try:
            if known.compare(self._tensors, self._first_versions, args, kwargs, self._key, self._is_new):
                return True
        except UnknownArgumentError:
            pass
        self._forget_since(known.seen)
        return False

    def _is_new(self, value: Any, key: Any) -> bool:
        """Whether a value is a tensor that was not seen, and is compared by this. Notes it, if it is not known."""
        _, shape, dtype, storage, (kind, _), counted, strides = key
        if type(value) is not kind or kind not in PLAIN:
            return bool(self._key(value) == key)
        if value.shape != shape or value.dtype is not dtype:
            return False
        self._storage()
        if storage != len(self._storages) and id(value) in self._numbers:  # in a memory of its own it is not known
            return False
        version = version_of(value)
        self._tensors.append(value)
        self._first_versions.append(version)
        return (version != UNCOUNTED) is counted and self._storage() == storage and _strides(value) == strides

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
        if not self._is_new(out, known.result):
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
            self._numbered.pop(id(tensor), None)
        del self._tensors[count:], self._first_versions[count:]
        self._stored = min(self._stored, count)

    def _versions_in(self, key: Any) -> dict[int, int]:
        """id of each tensor in an edge -> how many writes torch had counted when it was made."""
        if not isinstance(key, tuple) or not key or isinstance(key, torch.Size):
            return {}
        if type(key[0]) is int:
            number = key[0]
            writes = key[1] if is_known(key) else 0
            return {id(self._tensors[number]): self._first_versions[number] + writes}
        versions: dict[int, int] = {}
        for part in key:
            versions.update(self._versions_in(part))
        return versions
