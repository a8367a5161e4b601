"""Of which operations the result need not be looked at, because it follows from the arguments.

What a forward did before is compared operation by operation. If the function and its arguments are the same, then the
shape and dtype of what most of torch's functions return are as well, and whether it is a view of an argument: by these
names, of plain strided tensors. What depends on values (`nonzero`, an index by a mask), on a subclass or on somebody
else's operator is not here.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from salad_compile.common.torch_calls import name_of

PLAIN = frozenset({Tensor, nn.Parameter})

_VIEWS = (
    "view reshape flatten unflatten transpose permute movedim moveaxis swapaxes swapdims squeeze unsqueeze expand "
    "expand_as contiguous view_as reshape_as alias detach view_as_complex view_as_real"
)
_SELECTIONS = "select narrow split split_with_sizes chunk unbind repeat tile roll flip getitem setitem"
_OTHERS = "clone copy to float double half bfloat16 type_as mul add sub neg negative empty_like zeros_like"
# Whatever autocast is.
_ALWAYS = frozenset((*_VIEWS.split(), *_SELECTIONS.split(), *_OTHERS.split()))
# While autocast is as it was.
_UNDER_AUTOCAST = frozenset({"linear", "matmul", "cat", "concat", "stack", "rms_norm", "layer_norm"})

_OF_TORCH = frozenset({"torch", "torch._C._nn", "torch._tensor", "torch.functional", "torch.nn.functional"})
_OF_TENSORS = (types.MethodDescriptorType, types.WrapperDescriptorType)
_INDEXED = frozenset({"getitem", "setitem"})
_INDICES = frozenset({int, bool, slice, type(None), type(...)})


def is_certain(func: Callable[..., Any], args: Sequence[Any], tensors: Sequence[Tensor]) -> bool:
    """Whether a result follows from the arguments, as long as autocast is as it is where :func:`heeds_autocast`.

    Args:
        tensors: all of the arguments, also those in containers.
    """
    name = _name(func)
    if name not in _ALWAYS and name not in _UNDER_AUTOCAST:
        return False
    if name in _INDEXED and not (len(args) > 1 and _is_index(args[1])):
        return False
    return all(type(tensor) in PLAIN and tensor.layout is torch.strided for tensor in tensors)


def heeds_autocast(func: Callable[..., Any]) -> bool:
    """Whether autocast may decide what a function that is certain returns."""
    return _name(func) in _UNDER_AUTOCAST


def _is_index(value: Any) -> bool:
    """Whether an index holds no tensor, list or array, whose values could decide about a shape."""
    places = value if type(value) is tuple else (value,)
    bounds = [bound for p in places if type(p) is slice for bound in (p.start, p.stop, p.step)]
    return all(type(p) in _INDICES for p in places) and all(type(bound) in _INDICES for bound in bounds)


def _name(func: Callable[..., Any]) -> str:
    try:
        return _name_of_torch(func)
    except TypeError:  # some callables cannot be hashed
        return ""


@functools.lru_cache(maxsize=4096)
def _name_of_torch(func: Callable[..., Any]) -> str:
    """The name of a function or method of torch itself; the empty string for any other."""
    if isinstance(func, _OF_TENSORS):
        # private: the class of the methods of tensors. Seen in torch 2.13; test_known_results.py fails when it moves
        own = func.__objclass__ is torch._C.TensorBase
    else:
        own = isinstance(func, (types.BuiltinFunctionType, types.FunctionType)) and func.__module__ in _OF_TORCH
    return name_of(func, ())[0] if own else ""
