"""What a model's forward may keep from one call to the next, noted before a trial run and put back after it.

Forwards cache position tables: on modules and other objects, in dictionaries of Python modules and classes, in closures
and default arguments, behind `functools.lru_cache`. A trial run fills those with tensors of its own, which may be fake:
every later forward would fail on them.
"""

from __future__ import annotations

import functools
import gc
import itertools
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch.nn as nn
from torch import Tensor

# Code that keeps no tensors of a model, and whose state is not ours to put back.
_FOREIGN = frozenset(
    {*sys.stdlib_module_names, "torch", "triton", "numpy", "sympy", "transformers", "salad_compile", "_pytest"}
)
_PLAIN = (str, bytes, int, float, complex, bool, type(None), Tensor)
_LONG = 10_000
"""Containers of more entries are vocabularies, and no caches of tensors."""

_LruCache: Any = type(functools.lru_cache(maxsize=1)(len))


class ReachableState:
    """The state that is reached from a model and the code of its classes, and how to put it back.

    What belongs to the model is put back wherever it changed. What belongs to its code, such as a dictionary in a
    module of Python or a `functools.lru_cache`, is put back where it has been given tensors: other state of code, such
    as what was imported meanwhile, stays.
    """

    def __init__(self, model: nn.Module) -> None:
        self._seen: dict[int, Any] = {}  # holds the objects: an id of a freed one would be used again
        self._undo: list[Callable[[], None]] = []
        self._code: deque[Any] = deque()
        self._packages = set(_packages(model))
        owned = deque[Any](model.modules())
        while owned:
            owned.extend(self._visit(owned.popleft(), owned=True))
        while self._code:
            self._code.extend(self._visit(self._code.popleft(), owned=False))

    def put_back(self) -> None:
        """Undo what was changed since this was made."""
        for undo in self._undo:
            undo()

    def _visit(self, value: Any, *, owned: bool) -> Iterable[Any]:
        """Note what an object holds, and return that."""
        if isinstance(value, _PLAIN) or id(value) in self._seen:
            return ()
        self._seen[id(value)] = value
        if isinstance(value, _CODE):
            if owned:
                del self._seen[id(value)]
                self._code.append(value)
                return ()
            return self._visit_code(value)
        if isinstance(value, tuple | frozenset):
            return value if len(value) <= _LONG else ()
        if isinstance(value, dict | list | set | deque):
            return self._visit_container(value, owned)
        return self._visit_object(value, owned)

    def _visit_container(self, value: Any, owned: bool) -> Iterable[Any]:
        if len(value) > _LONG:
            return ()
        self._note(_Container(value), owned)
        return list(value.values()) if isinstance(value, dict) else list(value)

    def _visit_object(self, value: Any, owned: bool) -> Iterable[Any]:
        if _is_foreign(type(value).__module__) and not isinstance(value, nn.Module) and not _own_state(value):
            return ()
        self._code.append(type(value))
        found: list[Any] = []
        state = getattr(value, "__dict__", None)
        if isinstance(state, dict):
            self._note(_Container(state), owned)
            found.extend(state.values())
        if slots := _slots(type(value)):
            self._note(_Attributes(value, slots), owned)
            found.extend(getattr(value, name) for name in slots if hasattr(value, name))
        return found

    def _visit_code(self, value: Any) -> Iterable[Any]:
        """Modules of Python, classes, functions and what wraps them."""
        if isinstance(value, _LruCache):
            self._undo.append(functools.partial(_clear, value, value.cache_info().misses))
            return (value.__wrapped__,)
        if isinstance(value, types.CellType):
            self._note(_Attributes(value, ("cell_contents",)), False)
            return (value.cell_contents,) if hasattr(value, "cell_contents") else ()
        if isinstance(value, types.FunctionType):
            module = sys.modules.get(value.__globals__.get("__name__", ""))
            if _is_foreign(value.__module__) and not value.__closure__:
                return ()
            self._note(_Container(value.__dict__), False)
            inside = (value.__defaults__ or (), (value.__kwdefaults__ or {}).values(), value.__closure__ or ())
            return (module, *value.__dict__.values(), *itertools.chain(*inside))
        if isinstance(value, type):
            if _is_foreign(value.__module__):
                return ()
            self._note(_Attributes(value, None), False)
            return (*value.__mro__, *self._inside(value, value.__module__), sys.modules.get(value.__module__))
        if isinstance(value, types.ModuleType):
            if _is_foreign(value.__name__):
                return ()
            self._note(_Container(vars(value)), False)
            return self._inside(value, value.__name__)
        return [part for name in _WRAPPED if (part := getattr(value, name, None)) is not None]

    def _inside(self, value: Any, module: object) -> list[Any]:
        """What a class or module of Python holds; of packages that none of the model's classes is from, no code."""
        own = isinstance(module, str) and module.partition(".")[0] in self._packages
        held = (each for name, each in vars(value).items() if not name.startswith("__"))
        return [each for each in held if own or not isinstance(each, _LEADS_ON)]

    def _note(self, held: _Container | _Attributes, owned: bool) -> None:
        self._undo.append(functools.partial(held.put_back, owned))


_LEADS_ON = (type, types.FunctionType, types.ModuleType)
_WRAPPED = ("__func__", "__self__", "__wrapped__", "fget", "func", "args", "keywords")
_CODE = (
    type,
    types.FunctionType,
    types.MethodType,
    types.ModuleType,
    types.CellType,
    staticmethod,
    classmethod,
    property,
    functools.cached_property,
    functools.partial,
    functools.partialmethod,
    _LruCache,
)


class _Container:
    """A dictionary, list, set or deque, and what it held."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self.before = dict(value) if isinstance(value, dict) else list(value)

    def put_back(self, wholly: bool) -> None:
        value, before = self.value, self.before
        if not _differs(value, before) or not (wholly or holds_tensor(_new_entries(value, before))):
            return
        if isinstance(value, dict):
            for name in [name for name in value if name not in before]:
                del value[name]
            value.update(before)
        elif isinstance(value, set):
            value.clear()
            value.update(before)
        else:
            value.clear()
            value.extend(before)


class _Attributes:
    """Attributes that are in no dictionary of their own: of classes (names None), slots and cells."""

    def __init__(self, value: Any, names: tuple[str, ...] | None) -> None:
        self.value, self.names = value, names
        self.before = self._now()

    def _now(self) -> dict[str, Any]:
        if self.names is None:
            return dict(vars(self.value))
        return {name: getattr(self.value, name) for name in self.names if hasattr(self.value, name)}

    def put_back(self, wholly: bool) -> None:
        now, before = self._now(), self.before
        if not _differs(now, before) or not (wholly or holds_tensor(_new_entries(now, before))):
            return
        for name in now.keys() - before.keys():
            delattr(self.value, name)
        for name, value in before.items():
            if now.get(name) is not value:
                setattr(self.value, name, value)


def _packages(model: nn.Module) -> Iterator[str]:
    for cls in {type(module) for module in model.modules()}:
        yield from (base.__module__.partition(".")[0] for base in cls.__mro__ if issubclass(base, nn.Module))


def _clear(cache: Any, misses: int) -> None:
    """Empty a `functools.lru_cache` that has been given tensors."""
    # its entries are not documented; tests/salad_compile/discovery/test_reachable_state.py fails when they move
    if cache.cache_info().misses != misses and holds_tensor(_entries_of(cache)):
        cache.cache_clear()


def _entries_of(cache: Any) -> list[Any]:
    return [entry for entry in gc.get_referents(cache) if entry is not cache.__dict__ and not isinstance(entry, _CODE)]


def holds_tensor(value: Any) -> bool:
    """Whether there is a tensor in nested containers and objects."""
    seen: dict[int, Any] = {}
    todo = deque([value])
    while todo and len(seen) < _LONG:
        each = todo.popleft()
        if isinstance(each, Tensor):
            return True
        if id(each) in seen or isinstance(each, (*_PLAIN, *_CODE)):
            continue
        seen[id(each)] = each
        if isinstance(each, Mapping):
            todo.extend(itertools.chain(each.keys(), each.values()))
        elif isinstance(each, list | tuple | set | frozenset | deque):
            todo.extend(each)
        else:
            todo.extend(getattr(each, "__dict__", {}).values())
            todo.extend(getattr(each, name, None) for name in _slots(type(each)))
    return False


def _differs(now: Any, before: Any) -> bool:
    if len(now) != len(before):
        return True
    if isinstance(now, dict):
        return any(name not in now or now[name] is not value for name, value in before.items())
    return any(one is not other for one, other in zip(now, before, strict=True))


def _new_entries(now: Any, before: Any) -> list[Any]:
    if isinstance(now, dict):
        return [value for name, value in now.items() if name not in before or before[name] is not value]
    known = {id(each) for each in before}
    return [each for each in now if id(each) not in known]


def _slots(cls: type) -> tuple[str, ...]:
    return tuple(_slot_names(cls))


def _slot_names(cls: type) -> Iterator[str]:
    for base in cls.__mro__:
        names = base.__dict__.get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            if name not in ("__dict__", "__weakref__"):
                yield f"_{base.__name__.lstrip('_')}{name}" if name.startswith("__") else name


def _own_state(value: Any) -> bool:
    """Objects of the standard library that hold what others put in: weak dictionaries, namespaces, thread-locals."""
    return type(value).__module__ in ("weakref", "types", "_thread", "collections", "functools")


def _is_foreign(module: object) -> bool:
    name = module.partition(".")[0] if isinstance(module, str) else ""
    return name in _FOREIGN and name != "__main__"
