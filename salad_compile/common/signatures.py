"""The names of a forward's arguments, also where a decorator hides them behind `(*args, **kwargs)`."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

_MOST_POSITIONS = 32  # arguments that are named by their position where nothing else names them


def signature_of(forward: Callable[..., Any]) -> inspect.Signature:
    """The signature of a forward, or of the one function that its wrapper calls where the wrapper names no argument."""
    signature = inspect.signature(forward)
    if any(parameter.kind not in _VARIABLE for parameter in signature.parameters.values()):
        return signature
    named = [found for found in map(_without_self, _wrapped(forward, set())) if found.parameters]
    return named[0] if len(named) == 1 else signature


def argument_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Names of a forward's arguments by position; positions that only `*args` takes are named "0", "1" and so on."""
    parameters = signature_of(forward).parameters.values()
    named = [parameter.name for parameter in parameters if parameter.kind not in _VARIABLE]
    if all(parameter.kind is not inspect.Parameter.VAR_POSITIONAL for parameter in parameters):
        return tuple(named)
    return (*named, *(str(at) for at in range(len(named), _MOST_POSITIONS)))


_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _wrapped(forward: Callable[..., Any], seen: set[int]) -> Iterator[types.FunctionType]:
    """The functions that a wrapper without names holds, innermost names only."""
    function = getattr(forward, "__func__", forward)
    for cell in getattr(function, "__closure__", None) or ():
        try:
            held = cell.cell_contents
        except ValueError:  # not filled yet
            continue
        inner = getattr(held, "__func__", held)
        if not isinstance(inner, types.FunctionType) or id(inner) in seen:
            continue
        seen.add(id(inner))
        parameters = [parameter for name, parameter in inspect.signature(inner).parameters.items() if name != "self"]
        if any(parameter.kind not in _VARIABLE for parameter in parameters):
            # helpers of the wrapper take no `self`
            if next(iter(inspect.signature(inner).parameters)) == "self":
                yield inner
        else:
            yield from _wrapped(inner, seen)


def _without_self(function: types.FunctionType) -> inspect.Signature:
    signature = inspect.signature(function)
    return signature.replace(parameters=list(signature.parameters.values())[1:])
