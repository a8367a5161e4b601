"""Calls of torch as modes and graphs show them: one name for each, and its arguments by place or by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_SAME = {
    "multiply": "mul",
    "rmul": "mul",
    "imul": "mul",
    "truediv": "div",
    "true_divide": "div",
    "divide": "div",
    "itruediv": "div",
    "rmatmul": "other way round",
    "rtruediv": "other way round",
}
_WRITES = frozenset({"imul", "itruediv", "iadd", "isub", "setitem"})
_NUMPYS = {"dim": "axis", "keepdim": "keepdims"}


def name_of(function: Any, args: Sequence[Any]) -> tuple[str, bool]:
    """One name for functions, methods and operators that do the same, and whether it writes into its operand."""
    if isinstance(function, str):
        raw = function
    elif function is getattr:
        raw = str(args[1])
    else:
        raw = getattr(function, "__name__", "")
        if raw == "__get__":  # of a property: `x.mT`
            raw = getattr(getattr(function, "__self__", None), "__name__", "")
    raw = raw.partition(".")[0]  # an overload's is "copy_.default"
    name = raw.strip("_")
    writes = name in _WRITES or (raw.endswith("_") and not raw.endswith("__"))
    return _SAME.get(name, name), writes


def argument_of(args: Sequence[Any], kwargs: Mapping[str, Any], at: int, name: str, default: Any = None) -> Any:
    """An argument by its place, by its name, or by NumPy's name for it, which torch's functions take too.

    Args:
        at: its place among positional arguments. default: what it is where it is not given.
    """
    if at < len(args):
        return args[at]
    return kwargs.get(name, kwargs.get(_NUMPYS.get(name, name), default))
