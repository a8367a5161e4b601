"""`salad::block_sparse_attention` and its backward operator."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import FunctionCtx

from ..autocast import without_autocast
from ..checks import accumulation_dtype, valid_or_zero
from ..differentiation import refuse_second_derivative, reverse_mode_only
from ..direct import call_operator, direct, is_direct
from ..engines import Call, choose, serve
from ..layout import empty_bshd
from ..measure import is_listening, record_execution, record_selection
from ..selection import Selection
from .checks import check_arguments, check_contents, check_gradient, check_types


@torch.library.custom_op("salad::block_sparse_attention", mutates_args=())
@direct("salad::block_sparse_attention")
@reverse_mode_only
@without_autocast
def block_sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lut: torch.Tensor,
    count: torch.Tensor,
    query_block: int,
    key_block: int,
    scale: float,
    key_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact softmax attention over the selected key blocks of every query block (specification 4.2, step 6).

    A query that sees no key, because its block's count is 0 or every key is masked, gives 0 (and lse -inf), with zero
    gradients.

    Args:
        query, key: (B, H, S, D), any strides; fp32, bf16, fp16 or fp64. 16-bit inputs accumulate in fp32.
        value: (B, H, S, Dv), same dtype.
        lut: int32 (B, H, Mq, K), ascending ids of the selected key blocks, Mq = ceil(S / query_block).
        count: int32 (B, H, Mq), valid entries per row of lut; the others are ignored. ALL_BLOCKS (-1) instead: the
            query block attends to every key block and its row of lut is ignored; text rows of a joint sequence do.
        query_block, key_block: tokens per block; blocks are consecutive runs of tokens, only the last one is short.
        scale: factor on the scores, usually D ** -0.5.
        key_mask: bool (B, S), True where a key is valid; None where all are. Of the others nothing is used, whatever
            stands there, NaN too.

    Returns:
        out: (B, H, S, Dv) in the query's dtype, laid out as a contiguous (B, S, H, Dv) seen transposed.
        lse: (B, H, S), natural logarithm of the softmax denominator, fp32 (fp64 for fp64); not differentiable.

    Raises:
        KernelArgumentError: on wrong ranks, shapes, dtypes, devices or block sizes; on the CPU also if lut or count
            hold values they must not. On a GPU such values are read as others, and a later call raises: see
            `deferred.py`.
        UnsupportedKernelError: the engine has no kernel for this dtype, head_dim, block size or GPU.
    """
    return _attend(_describe, query, key, value, Selection(lut, count, query_block, key_block, scale, key_mask))


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, selection: Selection) -> torch.Tensor:
    """The first result of `block_sparse_attention`, by the shortest way, see `direct.call_operator`."""
    arguments = (query, key, value, *selection)
    out: torch.Tensor
    if is_listening() or not is_direct(arguments) or torch.is_autocast_enabled("cpu"):
        out = call_operator(torch.ops.salad.block_sparse_attention.default, *arguments)[0]
    else:
        out = _attend(_describe_without_lse, query, key, value, selection)[0]
    return out


def _attend(
    describe: Callable[..., Call], query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, selection: Selection
) -> tuple[torch.Tensor, torch.Tensor]:
    engine, call = serve(describe, query, key, value, *selection)
    check_contents(selection, query.shape[2])
    key_mask = selection.key_mask
    key, value = valid_or_zero(key, key_mask), valid_or_zero(value, key_mask)
    record_execution(selection, query.shape[2], engine.name)
    out, lse = engine.run(call, query, key, value, selection)
    record_selection(selection, lse)
    return out, lse


def _describe(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *selected: Any) -> Call:
    selection = Selection(*selected)
    check_arguments(query, key, value, selection)
    return call_of("block_sparse_attention", query, key, value, selection)


def _describe_without_lse(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *selected: Any) -> Call:
    return dataclasses.replace(_describe(query, key, value, *selected), wants_lse=False)


def call_of(operator: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, selection: Selection) -> Call:
    """What an engine is asked about, of an operator over selected blocks."""
    return Call(
        operator,
        query.device,
        query.dtype,
        head_dim=query.shape[-1],
        value_dim=value.shape[-1],
        query_block=selection.query_block,
        key_block=selection.key_block,
        masked=selection.key_mask is not None,
        needs_gradient=query.requires_grad or key.requires_grad or value.requires_grad,
    )


@block_sparse_attention.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *selection: Any) -> tuple[torch.Tensor, ...]:
    check_types(query, key, value, Selection(*selection))
    batch, heads, tokens, _ = query.shape
    return (
        empty_bshd(query, batch, heads, tokens, value.shape[-1]),
        query.new_empty((batch, heads, tokens), dtype=accumulation_dtype(query.dtype)),
    )


@torch.library.custom_op("salad::block_sparse_attention_backward", mutates_args=())
@without_autocast
def block_sparse_attention_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    lut: torch.Tensor,
    count: torch.Tensor,
    query_block: int,
    key_block: int,
    scale: float,
    key_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `block_sparse_attention`; the weights are computed again from lse, chunk by chunk. Deterministic.

    Args:
        grad_out: (B, H, S, Dv) in the query's dtype, any strides, also expanded.
        out, lse: as `block_sparse_attention` returned them.
        query, key, value, lut, count, query_block, key_block, scale, key_mask: as given to the forward.

    Returns:
        grad_query, grad_key, grad_value in the dtypes and shapes of query, key and value, (B, S, H, D) in memory.

    Raises:
        KernelArgumentError: as `block_sparse_attention`, and if grad_out, out or lse do not fit.
    """
    selection = Selection(lut, count, query_block, key_block, scale, key_mask)
    check_arguments(query, key, value, selection)
    check_contents(selection, query.shape[2])
    check_gradient(grad_out, query, value, out, lse)
    key, value = valid_or_zero(key, key_mask), valid_or_zero(value, key_mask)
    call = call_of("block_sparse_attention_backward", query, key, value, selection)
    grad_query, grad_key, grad_value = choose(call).run(call, grad_out, query, key, value, out, lse, selection)
    return grad_query, grad_key, grad_value


@block_sparse_attention_backward.register_fake
def _(grad_out: torch.Tensor, *given: Any) -> tuple[torch.Tensor, ...]:
    query, key, value, _, _, *selection = given
    check_types(query, key, value, Selection(*selection))
    return empty_bshd(query, *query.shape), empty_bshd(key, *key.shape), empty_bshd(value, *value.shape)


def _setup(ctx: FunctionCtx, inputs: tuple[object, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key, value, lut, count, *settings, key_mask = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(query, key, value, out, lse, lut, count, key_mask)  # type: ignore[arg-type]
    ctx.settings = settings  # type: ignore[attr-defined]


def _backward(ctx: FunctionCtx, grad_out: torch.Tensor, _grad_lse: object) -> tuple[torch.Tensor | None, ...]:
    *saved, key_mask = ctx.saved_tensors  # type: ignore[attr-defined]
    grads = block_sparse_attention_backward(grad_out, *saved, *ctx.settings, key_mask)  # type: ignore[attr-defined]
    return (*grads, *(None,) * 6)


block_sparse_attention.register_autograd(_backward, setup_context=_setup)
refuse_second_derivative(block_sparse_attention_backward)
