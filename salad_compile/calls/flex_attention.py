"""`flex_attention`: what of it can become SALAD, and how modes get to see it outside of graphs.

Uncompiled it compiles itself, so that a function mode would be traced by Dynamo, and on the CPU it refuses tensors that
require gradients. While discovery or the eager twin runs, the function's code is exchanged for a call that any function
mode sees first: whoever imported it, wrapped it or compiled it, it is the same function object.

Other threads that call flex_attention meanwhile get the real one; what they compile meanwhile contains it, too.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

# `_identity` and `noop_mask` are private or undocumented. Seen in torch 2.11 and 2.13;
# tests/salad_compile/calls/test_flex_attention.py fails when they move.
from torch.nn.attention.flex_attention import _LARGE_SPARSE_BLOCK_SIZE, _identity, flex_attention, noop_mask
from torch.overrides import handle_torch_function, has_torch_function

from salad_compile.calls.adapters import AttentionArguments, adapter_of
from salad_compile.calls.code_exchange import CodeExchange

_SCORE_MOD, _BLOCK_MASK = "it has a score_mod of its own", "it has a block mask of its own"

# the same function, whatever code the public object has at the moment
real_flex_attention: Callable[..., Any] = types.FunctionType(
    flex_attention.__code__, flex_attention.__globals__, flex_attention.__name__, flex_attention.__defaults__
)
real_flex_attention.__kwdefaults__ = flex_attention.__kwdefaults__

_underneath: ContextVar[Callable[..., Any]] = ContextVar("flex_attention", default=real_flex_attention)
_exchange_of_flex = CodeExchange(flex_attention)


@contextlib.contextmanager
def seen_by_modes(underneath: Callable[..., Any]) -> Iterator[None]:
    """Let function modes see calls of flex_attention; `underneath` answers what no mode answers."""
    token = _underneath.set(underneath)
    try:
        with _exchange_of_flex.hold(_exchange.__code__):
            yield
    finally:
        _underneath.reset(token)


def _exchange(*args: Any, **kwargs: Any) -> Any:
    from salad_compile.calls.flex_attention import _dispatch  # this code runs with the globals of flex_attention

    return _dispatch(*args, **kwargs)


def _dispatch(*args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_compiling():
        return real_flex_attention(*args, **kwargs)
    tensors = tuple(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    if has_torch_function(tensors):
        return handle_torch_function(flex_attention, tensors, *args, **kwargs)
    return _underneath.get()(*args, **kwargs)


def stand_in(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Dense attention in the place of flex_attention, for discovery: results of its form, and no mask."""
    call = _of_function(query, key, value, *args, **kwargs)
    out = F.scaled_dot_product_attention(query, key, value, scale=call.scale, enable_gqa=bool(call.enable_gqa))
    return out if call.output is None else (out, out.new_zeros(out.shape[:-1]))


@adapter_of(flex_attention)
def _of_function(
    query: Any,
    key: Any,
    value: Any,
    score_mod: Any = None,
    block_mask: Any = None,
    scale: Any = None,
    enable_gqa: Any = False,
    return_lse: Any = False,
    kernel_options: Any = None,
    *,
    return_aux: Any = None,
) -> AttentionArguments:
    several = return_lse or return_aux is not None
    reason = "" if score_mod is None or score_mod is _identity else _SCORE_MOD
    if block_mask is not None and not (_is_one_block(block_mask.BLOCK_SIZE) and block_mask.mask_mod is noop_mask):
        reason = _BLOCK_MASK
    return AttentionArguments(
        query,
        key,
        value,
        scale=scale,
        enable_gqa=enable_gqa,
        output=0 if several else None,
        results=2 if several else None,
        reason=reason,
    )


@adapter_of(torch.ops.higher_order.flex_attention)
def _of_graph(
    query: Any, key: Any, value: Any, score_mod: Any, block_mask: Any, scale: Any, *rest: Any
) -> AttentionArguments:
    """The node in Dynamo's graphs: functions are nested graphs, the mask is a tuple that ends with sizes and function.

    Without a mask there is one of a single block.
    """
    reason = "" if _is_identity(score_mod) else _SCORE_MOD
    if not (_is_one_block(block_mask[-3:-1]) and _masks_nothing(block_mask[-1])):
        reason = _BLOCK_MASK
    return AttentionArguments(query, key, value, scale=scale, enable_gqa=True, output=0, reason=reason)


def _is_one_block(sizes: Any) -> bool:
    return all(isinstance(size, int) and size == _LARGE_SPARSE_BLOCK_SIZE for size in sizes)


def _nested(function: Any) -> fx.Graph | None:
    """The graph of a function that a node stands for."""
    if not isinstance(function, fx.Node) or function.op != "get_attr" or function.graph.owning_module is None:
        return None
    graph = getattr(function.graph.owning_module.get_submodule(str(function.target)), "graph", None)
    return graph if isinstance(graph, fx.Graph) else None


def _is_identity(function: Any) -> bool:
    graph = _nested(function)
    return graph is not None and _answer(graph) is next(iter(graph.nodes))


def _masks_nothing(function: Any) -> bool:
    """Whether a mask is :func:`noop_mask`, which answers `new_ones` of nothing."""
    graph = _nested(function)
    answer = None if graph is None else _answer(graph)
    return isinstance(answer, fx.Node) and answer.target == "new_ones"


def _answer(graph: fx.Graph) -> Any:
    answer = graph.output_node().args[0]
    return answer[0] if isinstance(answer, (tuple, list)) and len(answer) == 1 else answer
