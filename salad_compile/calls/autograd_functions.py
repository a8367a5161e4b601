"""Attention inside a `torch.autograd.Function`: how modes get to see it with its gradients.

`Function.apply` runs `forward` without gradients and answers for them with its own `backward`, which knows nothing of
what a mode put in the place of the attention inside. So while modes look, a call of `apply` whose forward turns out to
hold the attention call that is to be replaced is left and begun again in the open: forward runs as a plain function,
and autograd follows what it does. Other calls of `apply` run as they are.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function

from salad_compile.calls.code_exchange import CodeExchange, Held

# The code of `apply` is exchanged: whoever has a bound method of it has this function. It is public, that it is one in
# Python is not: seen in torch 2.11 and 2.13; tests/salad_compile/calls/test_flash_family.py fails when it is not.
_apply: Any = torch.autograd.Function.__dict__["apply"].__func__
_real_apply = types.FunctionType(_apply.__code__, _apply.__globals__, "apply", _apply.__defaults__, _apply.__closure__)
_real_apply.__kwdefaults__ = _apply.__kwdefaults__

_closed: ContextVar[bool] = ContextVar("salad_compile.inside_function", default=False)
_exchange_of_apply = CodeExchange(_apply)
_in_graphs = False


class AttentionInsideError(BaseException):
    """The forward of a Function has come to the attention call: not an error, and nobody else's to catch."""


class Applied:
    """What a mode is told that is called when `function.apply` is called."""

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        self.function = function
        self.__name__ = f"{function.__name__}.apply"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function.apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    def __repr__(self) -> str:
        return f"{self.function.__module__}.{self.function.__qualname__}"


@functools.cache
def applied(function: type[torch.autograd.Function]) -> Applied:
    """The one object that stands for calls of `function.apply`."""
    return Applied(function)


_known: set[type[torch.autograd.Function]] = set()


def know(function: type[torch.autograd.Function]) -> Applied:
    """Calls of `function.apply` are attention themselves, whatever is inside."""
    _known.add(function)
    if _in_graphs:
        torch.compiler.allow_in_graph(function)  # type: ignore[no-untyped-call]
    return applied(function)


def keep_whole_in_graphs() -> None:
    """Let Dynamo keep the calls of known Functions whole. Loads Dynamo."""
    global _in_graphs
    _in_graphs = True
    for function in _known:
        torch.compiler.allow_in_graph(function)  # type: ignore[no-untyped-call]


def leave_function() -> None:
    """To be called at an attention call that is to be replaced: begins the Function around it again, in the open."""
    if _closed.get():
        raise AttentionInsideError


def seen_by_modes() -> Held:
    """A context: let function modes see into autograd Functions. Other threads run theirs as ever."""
    return _exchange_of_apply.hold(_exchange_code())


@functools.cache
def _exchange_code() -> types.CodeType:
    def around(__class__: Any) -> Callable[..., Any]:  # `apply` has this one free variable, for its super()
        def exchanged(cls: Any, *args: Any, **kwargs: Any) -> Any:
            if False:
                return __class__
            from salad_compile.calls.autograd_functions import dispatch

            return dispatch(cls, args, kwargs)

        return exchanged

    return around(None).__code__


def dispatch(cls: type[torch.autograd.Function], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`cls.apply` while a mode looks somewhere."""
    tensors = tuple(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    if torch.compiler.is_compiling() or not has_torch_function(tensors):
        return _real_apply(cls, *args, **kwargs)
    if cls in _known:
        return handle_torch_function(applied(cls), tensors, *args, **kwargs)
    if not torch.is_grad_enabled():
        return _real_apply(cls, *args, **kwargs)
    token = _closed.set(True)
    try:
        return _real_apply(cls, *args, **kwargs)
    except AttentionInsideError:
        pass
    finally:
        _closed.reset(token)
    return _run_in_the_open(cls, args, kwargs)


class _Context:
    """What a forward gets as its context; nothing of it is read, because there is no backward."""

    def __init__(self, inputs: tuple[Any, ...]) -> None:
        self.needs_input_grad = tuple(isinstance(value, Tensor) and value.requires_grad for value in inputs)

    def save_for_backward(self, *tensors: Any) -> None:
        self.saved_tensors = tensors

    def save_for_forward(self, *tensors: Any) -> None: ...

    def mark_dirty(self, *tensors: Any) -> None: ...

    def mark_non_differentiable(self, *tensors: Any) -> None: ...

    def set_materialize_grads(self, value: bool) -> None: ...


class _KeepHistory(TorchFunctionMode):
    """Forwards take their inputs out of the graph by hand, to save them: here they must stay in it."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.detach or func is torch.detach:
            return args[0].view_as(args[0])
        return func(*args, **(kwargs or {}))


def _run_in_the_open(cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    separate = cls.setup_context is not torch.autograd.Function.setup_context
    with _KeepHistory():
        return cls.forward(*args, **kwargs) if separate else cls.forward(_Context(args), *args, **kwargs)
