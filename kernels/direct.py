"""Operators called without torch's dispatcher, where nobody but the dispatcher could see the difference.

A call through `torch.library` costs more than the work of a small call. Without gradients, modes, transforms and
tracing all that it does is to run the operator's function, so there the function is called as it is.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from .differentiation import in_forward_mode

Function = TypeVar("Function", bound=Callable[..., Any])

_TENSORS = frozenset({torch.Tensor, torch.nn.Parameter})
_PLAIN = frozenset({int, float, str, bool, type(None)})

# name -> the function, and what of it is left without decorators
_functions: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {}
_plain: dict[int, Callable[..., Any]] = {}  # by the id of an overload, which lives as long as torch does


class _Together(threading.local):
    """What is known of the calls that run together in a thread; None where none do."""

    facts: dict[Callable[[], Any], Any] | None = None


_together = _Together()


def direct(name: str) -> Callable[[Function], Function]:
    """Declare the function that an operator ("salad::...") runs. The operator must write into none of its arguments.

    The function may be decorated with `reverse_mode_only` and `without_autocast`, and nothing else.
    """

    def declare(function: Function) -> Function:
        _functions[name] = function, inspect.unwrap(function)
        return function

    return declare


def call_operator(overload: torch._ops.OpOverload, *arguments: Any) -> Any:
    """`overload(*arguments)`, by the shortest way. Of `fx.Proxy` objects too, which make a node of the overload.

    Args:
        overload: of an operator whose function is declared, as torch.ops.salad.take_rows.default.
    """
    if torch.compiler.is_compiling():
        return overload(*arguments)
    if _together.facts is not None:
        plain = _plain.get(id(overload))
        if plain is None:
            plain = _plain[id(overload)] = _functions[overload.name()][1]  # type: ignore[no-untyped-call]
        return plain(*arguments)
    if is_direct(arguments):
        function, plain = _functions[overload.name()]  # type: ignore[no-untyped-call]
        return function(*arguments) if torch.is_autocast_enabled("cpu") else plain(*arguments)
    return overload(*arguments)


def call_together(tensors: tuple[Any, ...], function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`: whether the operators that it calls are called directly is decided here, once.

    Args:
        tensors: all that the function is given, from which whatever its operators get must be made, by operations that
            keep such tensors what :func:`is_direct` wants them to be.
    """
    if torch.compiler.is_compiling() or _together.facts is not None or not is_direct(tensors):
        return function(*arguments)
    if torch.is_autocast_enabled("cpu"):
        return function(*arguments)
    _together.facts = {}
    try:
        with torch._C._AutoDispatchBelowAutograd():  # private, as in `without_autograd`
            return function(*arguments)
    finally:
        _together.facts = None


def without_autograd() -> contextlib.AbstractContextManager[Any]:
    """A context in which operators of torch do not pass by autograd, where it has nothing to do and nobody looks on.

    A private class of torch._C. Seen in torch 2.13; tests/kernels/test_direct.py fails when it moves. It saves a fifth
    of the time of a small operation. Writes are counted as ever.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or (_together.facts is None and _is_watched()):
        return contextlib.nullcontext()
    below: contextlib.AbstractContextManager[Any] = torch._C._AutoDispatchBelowAutograd()
    return below


def are_together() -> bool:
    """Whether the calls of :func:`call_together` run: on plain CPU tensors, without gradients."""
    return _together.facts is not None


def once(ask: Callable[[], Any]) -> Any:
    """`ask()`, asked once for all calls that run together."""
    facts = None if torch.compiler.is_compiling() else _together.facts
    if facts is None:
        return ask()
    if ask not in facts:
        facts[ask] = ask()
    return facts[ask]


def is_direct(arguments: tuple[Any, ...]) -> bool:
    """Whether a call with these arguments needs nothing from torch's dispatcher: plain CPU tensors, no gradients.

    On a GPU operators go through the dispatcher: there its time is hidden, and profiles show them by name.
    """
    if torch.compiler.is_compiling():
        return False
    if _together.facts is not None:
        return True
    if _is_watched():
        return False
    gradients = torch.is_grad_enabled()
    for argument in arguments:
        kind = type(argument)
        if kind in _TENSORS:
            if not argument.is_cpu or (gradients and argument.requires_grad):
                return False
        elif kind not in _PLAIN:
            return False
    return True


def _is_watched() -> bool:
    """Whether a mode, a transform (vmap, grad, jvp) or a tracer must see the operator and not what it runs.

    Four private functions of torch._C, seen in torch 2.13; tests/kernels/test_direct.py fails when they move.
    """
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.maybe_current_level() is not None
        or in_forward_mode()
        or torch._C._is_tracing()
    )
