"""The engines there are, in order of priority, and the one that a call gets."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ..direct import are_together, once
from ..errors import UnsupportedKernelError
from ..launch import interpreting, recording
from .call import Call, requests
from .engine import Engine

_engines: list[Engine] = []
_served: dict[Hashable, tuple[Engine, Call]] = {}
_MOST_SERVED = 1024  # then it starts anew


def register(engine: Engine, *, before: str | None = None) -> None:
    """Add an engine: in front of the one called `before`, which then serves what the new one does not, or as the last.

    Raises:
        UnsupportedKernelError: an engine has this name already, or none is called `before`.
    """
    if any(known.name == engine.name for known in _engines):
        raise UnsupportedKernelError(f"there is an engine {engine.name!r} already")
    _engines.insert(len(_engines) if before is None else _engines.index(find(before)), engine)
    _forget_choices()


def unregister(name: str) -> None:
    """Take an engine away.

    Raises:
        UnsupportedKernelError: there is no such engine.
    """
    _engines.remove(find(name))
    _forget_choices()


def _forget_choices() -> None:
    _choose.cache_clear()
    _served.clear()


def engines() -> tuple[Engine, ...]:
    """All engines, in order of priority."""
    return tuple(_engines)


def find(name: str) -> Engine:
    """The engine called `name`.

    Raises:
        UnsupportedKernelError: there is none; the message lists those there are.
    """
    for engine in _engines:
        if engine.name == name:
            return engine
    known = ", ".join(repr(engine.name) for engine in _engines)
    raise UnsupportedKernelError(f"unknown engine {name!r}; choose one of {known}")


@contextmanager
def use_engine(name: str) -> Iterator[None]:
    """While active, operators run on the engine `name`, in eager code and inside compiled graphs alike.

    Without a request every call gets the first engine that supports it. Operators that the engine does not offer at all
    stay on theirs.

    Args:
        name: "triton" (usual on CUDA), "torch" (usual elsewhere; runs on any device, also in fp64), or the name of an
            engine that was registered.

    Raises:
        UnsupportedKernelError: there is no such engine; and, inside, every call that it cannot serve says why.
    """
    find(name)
    requests.append(name)
    try:
        yield
    finally:
        # the last of that name: contexts nest, and may ask for the same engine
        del requests[len(requests) - 1 - requests[::-1].index(name)]


def choose(call: Call) -> Engine:
    """The engine for a call: the one that was asked for, if it offers the operator, else the first that supports it.

    Raises:
        UnsupportedKernelError: that engine cannot serve the call, or none can; the message has the reasons.
    """
    return _choose(call, _state())


def _state() -> tuple[bool, bool]:
    return interpreting(), recording()


def serve(describe: Callable[..., Call], *arguments: Any) -> tuple[Engine, Call]:
    """The engine for a call with these arguments, and what `describe` says of them, which is asked once of those alike.

    Args:
        describe: checks the arguments, and says what kind of call they make. It must look at no values, only at the
            shapes, dtypes, devices and `requires_grad` of tensors, and at the other arguments, which can be hashed.

    Raises:
        whatever `describe` raises. UnsupportedKernelError: see :func:`choose`.
    """
    together = are_together()  # then nothing but shapes and dtypes can differ
    kinds = [
        ((a.shape, a.dtype) if together else (a.shape, a.dtype, a.device, a.requires_grad))
        if isinstance(a, Tensor)
        else a
        for a in arguments
    ]
    alike = (together, describe, requests[-1] if requests else "", *once(_state), *kinds)
    served = _served.get(alike)
    if served is None:
        if len(_served) >= _MOST_SERVED:
            _served.clear()
        call = describe(*arguments)
        served = _served[alike] = choose(call), call
    return served


@functools.lru_cache(maxsize=1024)  # a layer makes several calls, and where the device is quick the host's time counts
def _choose(call: Call, _state: tuple[bool, bool]) -> Engine:
    offered = [engine for engine in _engines if call.operator in engine.operators]
    for engine in offered:
        if engine.name == call.requested:
            reason = engine.supports(call)
            if reason is not None:
                raise UnsupportedKernelError(
                    f"engine {engine.name!r} was asked for and cannot compute salad::{call.operator} here: {reason}"
                )
            return engine
    reasons = []
    for engine in offered:
        reason = engine.supports(call)
        if reason is None:
            return engine
        reasons.append(f"{engine.name!r}: {reason}")
    raise UnsupportedKernelError(f"no engine computes salad::{call.operator} here. {'; '.join(reasons)}")
