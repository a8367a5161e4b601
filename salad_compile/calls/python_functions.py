"""Attention that is a plain Python function (flash_attn, sageattention): how modes and Dynamo get to see the call.

Its code is exchanged for one that asks first: function modes see the call like one of torch's own functions, and Dynamo
keeps it as one node of the graph instead of looking inside. With neither, the function runs as ever. Whoever imported
it has the same function object; nothing is exchanged back, so that several threads cannot disagree.
"""

from __future__ import annotations

import functools
import inspect
import threading
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from salad_compile.calls.opaque_calls import call_in_graph

# (args, kwargs) of a function that takes query, key and value in one tensor -> those of one that takes three
Unpack = Callable[[tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]


class KnownFunction:
    """One Python function whose calls are attention.

    Attributes:
        function: what models call. real: the same with the code that it was written with. name: for messages.
        leaf: what stands for it in Dynamo's graphs; None until a graph may hold it.
        unpacked, unpack: the function that is called in its place once somebody looks, and its arguments.
    """

    def __init__(self, function: types.FunctionType) -> None:
        self.function = function
        self.name = f"{function.__module__}.{function.__qualname__}"
        self.real = types.FunctionType(
            function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
        )
        self.real.__kwdefaults__ = function.__kwdefaults__
        self.signature = inspect.signature(function)
        self.leaf: Callable[..., Any] | None = None
        self.unpacked: KnownFunction | None = None
        self.unpack: Unpack | None = None


_known: list[KnownFunction] = []
_places: dict[int, int] = {}  # id of a function -> its place above; they are never freed
_lock = threading.Lock()
_in_graphs = False


def know(function: Any) -> KnownFunction:
    """Let modes and Dynamo see the calls of a Python function from now on."""
    with _lock:
        place = _places.get(id(function))
        if place is None:
            place = _places[id(function)] = len(_known)
            _known.append(KnownFunction(function))
            function.__signature__ = _known[place].signature
            function.__code__ = _exchange(place, len(function.__code__.co_freevars))
            if _in_graphs:
                _keep_whole(_known[place])
        return _known[place]


def known(target: Any) -> KnownFunction | None:
    """What is known of a function, or of the target of a graph's node."""
    place = _places.get(id(getattr(target, "salad_attention", target)))
    return None if place is None else _known[place]


def keep_whole_in_graphs() -> None:
    """Let Dynamo keep the calls of known functions whole from now on. Loads Dynamo."""
    global _in_graphs
    with _lock:
        _in_graphs = True
        for entry in _known:
            if entry.leaf is None:
                _keep_whole(entry)


def _keep_whole(entry: KnownFunction) -> None:
    leaf = functools.partial(call_in_graph, entry.name, entry.real)
    entry.leaf = torch.compiler.allow_in_graph(_named(entry, leaf))  # type: ignore[no-untyped-call]


def _named(entry: KnownFunction, leaf: Callable[..., Any]) -> Callable[..., Any]:
    def attention_like(*args: Any, **kwargs: Any) -> Any:
        return leaf(*args, **kwargs)

    attention_like.__name__ = attention_like.__qualname__ = f"attention_like_{entry.real.__name__}"
    attention_like.salad_attention = entry.function  # type: ignore[attr-defined]
    return attention_like


def _exchange(place: int, free: int) -> types.CodeType:
    """Code that calls :func:`dispatch`, with as many free variables as the code that it replaces."""
    cells = "".join(f"cell_{i}, " for i in range(free))
    source = (
        f"def outer({cells}):\n"
        "    def exchanged(*args, **kwargs):\n"
        f"        if False: return ({cells})\n"
        "        from salad_compile.calls.python_functions import dispatch\n"
        f"        return dispatch({place}, args, kwargs)\n"
        "    return exchanged\n"
    )
    scope: dict[str, Any] = {}
    exec(source, scope)
    exchanged = scope["outer"](*[None] * free)
    code: types.CodeType = exchanged.__code__
    return code


def dispatch(place: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call of a known function: seen by Dynamo or a mode where there is one."""
    entry = _known[place]
    if torch.compiler.is_compiling():
        if entry.unpack is not None and entry.unpacked is not None:
            args, kwargs = entry.unpack(args, kwargs)
            entry = entry.unpacked
        if entry.leaf is not None and fits_a_graph(args) and fits_a_graph(kwargs.values()):
            return entry.leaf(*args, **kwargs)
        return entry.real(*args, **kwargs)
    tensors = tuple(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    if has_torch_function(tensors):
        if entry.unpack is not None and entry.unpacked is not None:
            args, kwargs = entry.unpack(args, kwargs)
            return entry.unpacked.function(*args, **kwargs)
        return handle_torch_function(entry.function, tensors, *args, **kwargs)
    return entry.real(*args, **kwargs)


def fits_a_graph(values: Any) -> bool:
    """Whether a node can hold these arguments: tensors, numbers, words and tuples, and no object of a library."""
    for value in values:
        if isinstance(value, (tuple, list)):
            if not fits_a_graph(value):
                return False
        elif value is not None and not isinstance(value, (Tensor, int, float, bool, str)):
            return False
    return True
