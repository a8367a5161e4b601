"""`salad::tail_tokens` and `salad::attend_with_tail`: block-sparse attention that remembers what it leaves out."""

from __future__ import annotations

from typing import Any

import torch

from ..autocast import without_autocast
from ..block_sparse.api import call_of
from ..block_sparse.checks import check_arguments, check_contents, check_gradient
from ..checks import valid_or_zero
from ..differentiation import refuse_second_derivative, reverse_mode_only
from ..engines import Call, choose
from ..layout import block_count
from ..measure import is_listening, record_execution
from ..pools import Pools
from ..selection import Selection
from .checks import check_pool_size, check_pools, check_video


@torch.library.custom_op("salad::tail_tokens", mutates_args=())
def tail_tokens(
    lut: torch.Tensor,
    count: torch.Tensor,
    tokens: int,
    key_block: int,
    pool: int,
    begin: int,
    end: int,
    key_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """How many tokens of each pool a query block leaves out (specification 4.6; our choice). Not differentiable.

    Args:
        lut, count: the lists of selected key blocks, see `block_sparse_attention`.
        tokens: S. key_block: tokens per key block.
        pool: tokens per pool: consecutive runs, of which the last may be short. It or `key_block` divides the other.
        begin, end: only tokens [begin, end) count: those of the video.
        key_mask: bool (B, S), True where a key is valid; None where all are. Others do not count.

    Returns:
        fp32 (B, H, Mq, P), P = ceil(S / pool).

    Raises:
        KernelArgumentError: a size is not positive, neither divides the other, or the range lies outside the tokens.
    """
    check_pool_size(pool, key_block)
    check_video(begin, end, tokens)
    call = Call("count_tail", lut.device, torch.float32, key_block=key_block, masked=key_mask is not None)
    counted: torch.Tensor = choose(call).run(call, lut, count, tokens, key_block, pool, begin, end, key_mask)
    return counted


@tail_tokens.register_fake
def _(lut: torch.Tensor, count: torch.Tensor, tokens: int, key_block: int, pool: int, *rest: Any) -> torch.Tensor:
    check_pool_size(pool, key_block)
    return lut.new_empty((*lut.shape[:3], block_count(tokens, pool)), dtype=torch.float32)


@torch.library.custom_op("salad::attend_with_tail", mutates_args=())
@reverse_mode_only
@without_autocast
def attend_with_tail(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pooled_key: torch.Tensor,
    pooled_value: torch.Tensor,
    pool_tokens: torch.Tensor,
    log_weight: torch.Tensor | None,
    lut: torch.Tensor,
    count: torch.Tensor,
    query_block: int,
    key_block: int,
    scale: float,
    key_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One softmax over the tokens of the selected key blocks and over pools of the others (specification 4.6).

    Args:
        query, key, value, lut, count, query_block, key_block, scale, key_mask: see `block_sparse_attention`.
        pooled_key: (B, H, P, D), pooled_value: (B, H, P, Dv): a key and a value for each pool, in the query's dtype.
        pool_tokens: fp32 (B, H, Mq, P), for how many tokens a pool stands, of `tail_tokens`; without a gradient.
        log_weight: fp32 or fp64 (H,), added to the scores of each head's pools; None for 0.

    Returns:
        out: (B, H, S, Dv), lse: (B, H, S), as `block_sparse_attention` returns them, of all columns together.

    Raises:
        KernelArgumentError: on wrong ranks, shapes, dtypes or devices.
        UnsupportedKernelError: the engine has no kernel for this dtype, head_dim, block size or GPU.
    """
    selection = Selection(lut, count, query_block, key_block, scale, key_mask)
    pools = Pools(pooled_key, pooled_value, pool_tokens, log_weight)
    call, key, value = _checked("attend_with_tail", query, key, value, pools, selection)
    engine = choose(call)
    record_execution(selection, query.shape[2], engine.name)
    if is_listening():  # to the selection and to the softmax of its columns alone
        torch.ops.salad.block_sparse_attention.default(query, key, value, *selection)
    out, lse = engine.run(call, query, key, value, pools, selection)
    return out, lse


@attend_with_tail.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    _, _, _, _, *selection = given
    out, lse = torch.ops.salad.block_sparse_attention.default(query, key, value, *selection)
    return out, lse  # its fake: pools change no shape


def _checked(
    operator: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pools: Pools,
    selection: Selection,
) -> tuple[Call, torch.Tensor, torch.Tensor]:
    """The call, after every check, and key and value with zeros in the place of what the mask leaves out."""
    check_arguments(query, key, value, selection)
    check_contents(selection, query.shape[2])
    check_pools(query, value, selection.lut, pools)
    call = call_of(operator, query, key, value, selection)
    return call, valid_or_zero(key, selection.key_mask), valid_or_zero(value, selection.key_mask)


@torch.library.custom_op("salad::attend_with_tail_backward", mutates_args=())
@without_autocast
def attend_with_tail_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    pooled_key: torch.Tensor,
    pooled_value: torch.Tensor,
    pool_tokens: torch.Tensor,
    log_weight: torch.Tensor | None,
    lut: torch.Tensor,
    count: torch.Tensor,
    query_block: int,
    key_block: int,
    scale: float,
    key_mask: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """Gradients of query, key, value, pooled key and value, and, fp32 (H,), of the log weights."""
    selection = Selection(lut, count, query_block, key_block, scale, key_mask)
    pools = Pools(pooled_key, pooled_value, pool_tokens, log_weight)
    call, key, value = _checked("attend_with_tail_backward", query, key, value, pools, selection)
    check_gradient(grad_out, query, value, out, lse)
    return [*choose(call).run(call, grad_out, query, key, value, out, lse, pools, selection)]


@attend_with_tail_backward.register_fake
def _(grad_out: torch.Tensor, *given: Any) -> list[torch.Tensor]:
    query, key, value, out, lse, pooled_key, pooled_value, _, _, *selection = given
    grads = torch.ops.salad.block_sparse_attention_backward.default(grad_out, query, key, value, out, lse, *selection)
    return [*grads, *(x.new_empty(x.shape) for x in (pooled_key, pooled_value)), lse.new_empty((query.shape[1],))]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *tensors, lut, count, query_block, key_block, scale, key_mask = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(*tensors[:3], out, lse, *tensors[3:], lut, count, key_mask)
    ctx.settings = (query_block, key_block, scale)


def _backward(ctx: Any, grad_out: torch.Tensor, _grad_lse: object) -> tuple[torch.Tensor | None, ...]:
    *saved, key_mask = ctx.saved_tensors
    *grads, of_weight = attend_with_tail_backward(grad_out, *saved, *ctx.settings, key_mask)
    weight = saved[8]
    return (*grads, None, None if weight is None else of_weight.to(weight.dtype), *(None,) * 6)


attend_with_tail.register_autograd(_backward, setup_context=_setup)
refuse_second_derivative(attend_with_tail_backward)
