"""Errors of this package that leave `torch.compile` as themselves: their own class, their own message, a short trace.

What a backend raises Dynamo wraps in `BackendCompilerFailed`, with frames and advice of its own round the message. It
hands on what is one already. So each error is raised as an object of its class and of that one: `except` clauses for
either see it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from salad_compile.errors import SaladError
from salad_compile.kernels.errors import KernelArgumentError, KernelDifferentiationError

if TYPE_CHECKING:
    from torch._dynamo.exc import BackendCompilerFailed

OURS = (SaladError, KernelArgumentError, KernelDifferentiationError)


def reject_plainly(backend: Callable[..., Any]) -> Callable[..., Any]:
    """The backend, whose errors of this package reach the caller of the compiled model as themselves."""

    @functools.wraps(backend)
    def compile_graph(*args: Any, **kwargs: Any) -> Any:
        try:
            return backend(*args, **kwargs)
        except Exception as error:
            ours = _own_error(error)
            if ours is None:
                raise
            rejection = _rejection(ours, compile_graph)
            del ours
        try:
            raise rejection
        finally:
            del rejection  # the frame would keep it, and it the frame with the model

    return compile_graph


def _own_error(error: BaseException) -> Exception | None:
    """The error of this package, which Inductor may have wrapped in its own."""
    for candidate in (error, getattr(error, "inner_exception", None)):
        if isinstance(candidate, OURS):
            return candidate
    return None


def _rejection(error: Exception, backend: Callable[..., Any]) -> BackendCompilerFailed:
    # private: seen in torch 2.11 and 2.13; tests/salad_compile/backend/test_rejections.py fails when it moves. Here,
    # because Inductor comes with it
    from torch._dynamo.exc import BackendCompilerFailed

    kind = _rejection_class(type(error))  # type: ignore[arg-type]  # classes are hashable
    arguments = error.__reduce__()[1]  # of an OSError also those that `args` leaves out
    made = kind.__new__(kind, *arguments)
    BackendCompilerFailed.__init__(made, backend, error, sys._getframe(1))
    type(error).__init__(made, *arguments)
    vars(made).update(vars(error))
    return made


@functools.cache
def _rejection_class(kind: type[Exception]) -> type[BackendCompilerFailed]:
    """A class that prints like `kind`, and is one, too."""
    from torch._dynamo.exc import BackendCompilerFailed

    members = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__str__": lambda self: str(self.inner_exception),  # Dynamo adds advice to the arguments
        "__reduce__": lambda self: self.inner_exception.__reduce__(),  # other processes get the plain error
    }
    return type(kind.__name__, (kind, BackendCompilerFailed), members)
