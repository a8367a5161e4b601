"""Python functions of attention in graphs, where the passes left their calls as they are.

A function that PyTorch can trace (custom operators with fake versions) is traced. Of one that it cannot trace (kernels
of Triton or the CuTe DSL behind plain Python) the call becomes one operator, which runs the function; its backward runs
the function's forward once more, so that no state is kept beside the graph.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# Private. Seen in torch 2.11 and 2.13; tests/salad_compile/calls/test_flash_family.py fails when it moves.
from torch._subclasses.fake_tensor import is_fake

_functions: dict[str, Callable[..., Any]] = {}
_traceable: dict[str, bool] = {}


def call_in_graph(name: str, real: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A call of `real` from a graph: itself where it can be traced, else the operator that runs it."""
    _functions[name] = real
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    if not any(is_fake(tensor) for tensor in tensors):
        return real(*args, **kwargs)
    if _traceable.get(name, True):
        try:
            out = real(*args, **kwargs)
        except Exception:  # whatever a kernel says of tensors that have no memory
            _traceable[name] = False
        else:
            _traceable[name] = True
            return out
    tensors, recipe = _packed(name, args, kwargs)
    out = torch.ops.salad.attention_function(tensors, recipe)
    return (out, None) if _answers_several(real, kwargs) else out


def _answers_several(real: Callable[..., Any], kwargs: Mapping[str, Any]) -> bool:
    """flash-attn-4 answers the log-sum-exp beside the attention, whoever asks."""
    several: Callable[..., bool] | None = getattr(real, "answers_several", None)
    return several is not None and several(kwargs)


def _packed(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Tensor], str]:
    """The tensors of a call, and the rest of it as text, which the caches of compiled code can hold."""
    tensors: list[Tensor] = []

    def pack(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors.append(value)
            return {"tensor": len(tensors) - 1}
        if isinstance(value, (tuple, list)):
            return {"items": [pack(item) for item in value]}
        return int(value) if isinstance(value, torch.SymInt) else value

    call = {"name": name, "args": [pack(v) for v in args], "kwargs": {key: pack(v) for key, v in kwargs.items()}}
    return tensors, json.dumps(call)


def _run(tensors: Sequence[Tensor], recipe: str) -> Tensor:
    call = json.loads(recipe)

    def unpack(value: Any) -> Any:
        if isinstance(value, dict):
            return tensors[value["tensor"]] if "tensor" in value else tuple(unpack(item) for item in value["items"])
        return value

    args, kwargs = [unpack(v) for v in call["args"]], {key: unpack(v) for key, v in call["kwargs"].items()}
    out = _functions[call["name"]](*args, **kwargs)
    result: Tensor = out[0] if isinstance(out, (tuple, list)) else out
    return result.contiguous()


@torch.library.custom_op("salad::attention_function", mutates_args=())
def attention_function(tensors: list[Tensor], recipe: str) -> Tensor:
    """The attention of one call of a known Python function: query, key and value are the first three tensors."""
    return _run(tensors, recipe)


@attention_function.register_fake
def _attention_function_fake(tensors: list[Tensor], recipe: str) -> Tensor:
    return tensors[0].new_empty((*tensors[0].shape[:-1], tensors[2].shape[-1]))


@torch.library.custom_op("salad::attention_function_backward", mutates_args=())
def attention_function_backward(grad: Tensor, tensors: list[Tensor], recipe: str) -> list[Tensor]:
    """The gradients of query, key and value."""
    with _recording():
        leaves = [x.detach().requires_grad_() if i < 3 else x for i, x in enumerate(tensors)]
        out = _run(leaves, recipe)
        grads = torch.autograd.grad(out, leaves[:3], grad)
    return [x.contiguous() for x in grads]


@attention_function_backward.register_fake
def _attention_function_backward_fake(grad: Tensor, tensors: list[Tensor], recipe: str) -> list[Tensor]:
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors[:3]]


@contextlib.contextmanager
def _recording() -> Iterator[None]:
    """Autograd inside an operator, which runs below it.

    The key and the functions are private: seen in torch 2.11 and 2.13; tests/salad_compile/calls/test_flash_family.py.
    """
    key = torch._C.DispatchKey.AutogradFunctionality
    before = torch._C._dispatch_tls_is_dispatch_key_excluded(key)
    torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
    try:
        with torch.enable_grad():
            yield
    finally:
        torch._C._dispatch_tls_set_dispatch_key_excluded(key, before)


def _setup_context(ctx: Any, inputs: tuple[list[Tensor], str], output: Tensor) -> None:
    tensors, ctx.recipe = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> Any:
    tensors = list(ctx.saved_tensors)
    grads = torch.ops.salad.attention_function_backward(grad, tensors, ctx.recipe)
    return [*grads, *[None] * (len(tensors) - 3)], None


attention_function.register_autograd(_backward, setup_context=_setup_context)
