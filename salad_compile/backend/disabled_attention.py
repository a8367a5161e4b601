"""Attention in functions under `torch.compiler.disable`: found in the code of a model's modules, which never runs here.

A function counts if the forward of a module may call it: it is named there and found among its globals, in its closure,
or on the module. What is found so is a guess; whether Dynamo met such a function is asked elsewhere (compile_ends.py).
"""

from __future__ import annotations

import contextlib
import dis
import functools
import inspect
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch.nn as nn

from salad_compile.backend.graph_break_reasons import of_torch
from salad_compile.calls.adapters import is_attention

# Private: what `torch.compiler.disable` writes on its wrappers, and on functions that are disabled by themselves. Seen
# in torch 2.11 and 2.13; tests/salad_compile/backend/test_disabled_attention.py fails when they move.
_DISABLED, _ORIGINAL = "_torchdynamo_disable", "_torchdynamo_orig_callable"
_SDPA = "scaled_dot_product_attention"
_PRODUCTS = {"matmul", "bmm", "baddbmm", "einsum"}


def disabled_attention(model: nn.Module) -> list[str]:
    """Name and place of each disabled function of a model that calls attention, in the order of its modules."""
    found: dict[str, None] = {}
    seen: set[Any] = set()
    for module in model.modules():
        for function in _entries(module):
            _walk(function, module, seen, found)
    return list(found)


def _walk(function: Any, owner: Any, seen: set[Any], found: dict[str, None]) -> None:
    for called, its_owner in _reach(function, owner, seen):
        if _is_disabled(called) and any(_calls_attention(each) for each, _ in _reach(called, its_owner, set())):
            found[_describe(called)] = None


def _entries(module: nn.Module) -> Iterator[Any]:
    """The forward of a module, and the functions and processors that it keeps as attributes."""
    yield module.forward
    if _is_disabled(module._call_impl):  # what disabling a class of modules replaces; private, as above
        yield module._call_impl
    yield from (value for value in vars(module).values() if callable(value) and not isinstance(value, type))


def _reach(function: Any, owner: Any, seen: set[Any]) -> Iterator[tuple[Any, Any]]:
    """All functions that one may call, itself first, each with the object that is its `self`."""
    todo = [(function, owner)]
    for called, its_owner in todo:
        plain, bound = _plain(called)
        its_owner = bound if bound is not None else its_owner
        if not isinstance(plain, FunctionType):
            if is_attention(plain):
                yield called, its_owner
            continue
        whole = isinstance(its_owner, nn.Module) and plain.__name__ in _CALLS and _is_disabled(called)
        key = (plain, _is_disabled(called), id(its_owner) if whole else 0)
        if key in seen or (of_torch(plain.__code__.co_filename) and not whole):
            continue
        seen.add(key)
        yield called, its_owner
        if whole:
            todo.extend((entry, module) for module in its_owner.modules() for entry in _entries(module))
        else:
            todo.extend((value, its_owner if is_method else None) for value, is_method in _named(plain, its_owner))


_CALLS = ("__call__", "_call_impl", "_wrapped_call_impl")


def _named(function: FunctionType, owner: Any) -> Iterator[tuple[Any, bool]]:
    """What the names in the code of a function stand for, as far as it is callable, and whether it is its owner's."""
    names = sorted({name for code in _codes(function.__code__) for name in (*code.co_names, *code.co_freevars)})
    known = dict(function.__globals__)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # of an empty cell
            known[name] = cell.cell_contents
    values = [known[name] for name in names if name in known]
    libraries = [value for value in values if isinstance(value, ModuleType) and not of_torch(_file(value))]
    values += [vars(library)[name] for library in libraries for name in names if name in vars(library)]
    yield from ((value, False) for value in values if callable(value) and not isinstance(value, type))
    if owner is not None:
        places = [vars(owner) if hasattr(owner, "__dict__") else {}, *map(vars, type(owner).__mro__)]  # super() too
        own = (place[name] for place in places for name in names if name in place)
        yield from ((value, True) for value in own if callable(value) and not isinstance(value, (type, nn.Module)))


def _file(library: ModuleType) -> str:
    return getattr(library, "__file__", None) or ""


def _layers(called: Any) -> Iterator[tuple[Any, Any]]:
    """Wrappers, bound methods and objects with `__call__` from the outside to the function, each with its `self`."""
    bound = None
    for _ in range(_MOST_WRAPPERS):
        yield called, bound
        attributes = vars(called) if hasattr(called, "__dict__") else {}
        if isinstance(called, MethodType):
            called, bound = called.__func__, called.__self__
        elif isinstance(called, functools.partial):
            called = called.func
        elif _ORIGINAL in attributes or "__wrapped__" in attributes:
            called = attributes.get(_ORIGINAL, attributes.get("__wrapped__"))
        else:
            call = inspect.getattr_static(type(called), "__call__", None)
            if isinstance(called, FunctionType) or not isinstance(call, FunctionType):
                return
            called, bound = call, called


_MOST_WRAPPERS = 20


def _plain(called: Any) -> tuple[Any, Any]:
    """The function behind all layers, and the object that it is bound to."""
    return list(_layers(called))[-1]


def _is_disabled(called: Any) -> bool:
    return any(inspect.getattr_static(layer, _DISABLED, False) for layer, _ in _layers(called))


def _calls_attention(called: Callable[..., Any]) -> bool:
    plain, _ = _plain(called)
    if not isinstance(plain, FunctionType):
        return is_attention(plain)
    for code in _codes(plain.__code__):
        names = set(code.co_names)
        if _SDPA in names or any(is_attention(plain.__globals__.get(name)) for name in names):
            return True
        if "softmax" in names and (names & _PRODUCTS or any(i.argrepr == "@" for i in dis.get_instructions(code))):
            return True
    return False


def _codes(code: CodeType) -> Iterator[CodeType]:
    """A function's code and that of the functions and comprehensions inside of it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _describe(called: Any) -> str:
    plain, bound = _plain(called)
    if isinstance(bound, nn.Module) and getattr(plain, "__name__", "") in _CALLS:
        plain = type(bound).forward
    name = getattr(plain, "__qualname__", type(plain).__name__)
    code = getattr(plain, "__code__", None)
    return name if code is None else f"{name} at {code.co_filename}:{code.co_firstlineno}"
