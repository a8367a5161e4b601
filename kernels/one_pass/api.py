"""`salad::pool_and_summarise` and `salad::pool_and_read`: routing's means and linear attention from one read.

Routing wants the mean of every block of keys and queries, linear attention all keys, values and queries. Read together
they cost one pass over each tensor. The backward operators are those of linear attention: means have no gradient.
"""

import torch
from torch.autograd.function import FunctionCtx

from ..checks import accumulation_dtype
from ..dispatch import engine_for, without_autocast
from ..layout import block_count, empty_bshd
from ..linear.api import linear_output_backward, linear_state_backward
from ..linear.checks import check_output, check_output_types, check_state, check_state_types
from ..routing.checks import check_pool, check_pool_types

# --- pool_and_summarise ---------------------------------------------------------------------------------------------


@torch.library.custom_op("salad::pool_and_summarise", mutates_args=())
@without_autocast
def pool_and_summarise(
    key: torch.Tensor,
    value: torch.Tensor,
    order: torch.Tensor | None,
    block: int,
    feature_map: str,
    key_mask: torch.Tensor | None = None,
    rotated_key: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`pool_blocks` of the key and `linear_state`, from one read of key and value.

    Args:
        key: (B, H, S, D), any strides; fp32, bf16, fp16 or fp64 (fp64 on the torch engine).
        value: (B, H, S, Dv), same dtype.
        order: int32 (S,), a permutation, or None for the native order. Only the blocks depend on it.
        block: tokens per block of the order.
        feature_map: "relu", "elu" or "softmax", as in `linear_state`.
        key_mask: bool (B, S) in native order, True where a token is valid; the others leave means and sums. None: all.
        rotated_key: like key; stands in the place of phi(key) in the state, as in `linear_state`.

    Returns:
        pooled: (B, H, ceil(S / block), D), state: (B, H, D, Dv) and key_sum: (B, H, D), contiguous, fp32 (fp64 for
        fp64). pooled never requires grad: selection carries no gradient (specification 4.2, step 6).

    Raises:
        KernelArgumentError: on a wrong rank, shape, dtype, device, block size, order, mask or feature map.
        UnsupportedKernelError: the engine has no kernel for this dtype, head_dim, value width, block size or GPU.
    """
    check_pool(key, order, block, key_mask)
    check_state(key, value, feature_map, key_mask, rotated_key)
    engine = engine_for(__package__, key.device)
    result: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = engine.pool_and_summarise(
        key, value, order, block, feature_map, key_mask, rotated_key
    )
    return result


@pool_and_summarise.register_fake
def _(
    key: torch.Tensor,
    value: torch.Tensor,
    order: torch.Tensor | None,
    block: int,
    feature_map: str,
    key_mask: torch.Tensor | None = None,
    rotated_key: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    check_pool_types(key, order, block, key_mask)
    check_state_types(key, value, feature_map, key_mask, rotated_key)
    batch, heads, tokens, head_dim = key.shape
    dtype = accumulation_dtype(key.dtype)
    return (
        key.new_empty((batch, heads, block_count(tokens, block), head_dim), dtype=dtype),
        key.new_empty((batch, heads, head_dim, value.shape[-1]), dtype=dtype),
        key.new_empty((batch, heads, head_dim), dtype=dtype),
    )


def _summarise_setup(ctx: FunctionCtx, inputs: tuple[object, ...], output: tuple[torch.Tensor, ...]) -> None:
    key, value, _, _, ctx.feature_map, key_mask, rotated_key = inputs  # type: ignore[attr-defined]
    ctx.save_for_backward(key, value, key_mask, rotated_key)  # type: ignore[arg-type]
    ctx.mark_non_differentiable(output[0])


def _summarise_backward(
    ctx: FunctionCtx, grad_pooled: torch.Tensor, grad_state: torch.Tensor, grad_key_sum: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    key, value, key_mask, rotated_key = ctx.saved_tensors  # type: ignore[attr-defined]
    grad_key, grad_value, grad_rotated = linear_state_backward(
        grad_state,
        grad_key_sum,
        key,
        value,
        ctx.feature_map,  # type: ignore[attr-defined]
        key_mask,
        rotated_key,
    )
    return grad_key, grad_value, None, None, None, None, None if rotated_key is None else grad_rotated


pool_and_summarise.register_autograd(_summarise_backward, setup_context=_summarise_setup)

# --- pool_and_read --------------------------------------------------------------------------------------------------


@torch.library.custom_op("salad::pool_and_read", mutates_args=())
@without_autocast
def pool_and_read(
    query: torch.Tensor,
    state: torch.Tensor,
    key_sum: torch.Tensor,
    order: torch.Tensor | None,
    block: int,
    feature_map: str,
    eps: float,
    key_mask: torch.Tensor | None = None,
    rotated_query: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`pool_blocks` of the query and `linear_output`, from one read of the query.

    Args:
        query: (B, H, S, D), any strides; fp32, bf16, fp16 or fp64 (fp64 on the torch engine).
        state: (B, H, D, Dv) and key_sum: (B, H, D) from `pool_and_summarise`, fp32 (fp64 for an fp64 query).
        order: int32 (S,), a permutation, or None for the native order. Only the blocks depend on it.
        block: tokens per block of the order.
        feature_map, eps: as in `linear_output`.
        key_mask: bool (B, S) in native order, True where a token is valid; the others leave the means, and read out
            all the same. None: all are valid.
        rotated_query: like query; stands in the place of phi(query) in the numerator, as in `linear_output`.

    Returns:
        pooled: (B, H, ceil(S / block), D), contiguous, fp32 (fp64 for fp64); it never requires grad.
        out: (B, H, S, Dv) in native order and the query's dtype, a contiguous (B, S, H, Dv) seen transposed.

    Raises:
        KernelArgumentError: on a wrong rank, shape, dtype, device, eps, block size, order, mask or feature map.
        UnsupportedKernelError: the engine has no kernel for this dtype, head_dim, value width, block size or GPU.
    """
    check_pool(query, order, block, key_mask)
    check_output(query, state, key_sum, feature_map, eps, rotated_query)
    engine = engine_for(__package__, query.device)
    result: tuple[torch.Tensor, torch.Tensor] = engine.pool_and_read(
        query, state, key_sum, order, block, feature_map, eps, key_mask, rotated_query
    )
    return result


@pool_and_read.register_fake
def _(
    query: torch.Tensor,
    state: torch.Tensor,
    key_sum: torch.Tensor,
    order: torch.Tensor | None,
    block: int,
    feature_map: str,
    eps: float,
    key_mask: torch.Tensor | None = None,
    rotated_query: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    check_pool_types(query, order, block, key_mask)
    check_output_types(query, state, key_sum, feature_map, eps, rotated_query)
    batch, heads, tokens, head_dim = query.shape
    return (
        query.new_empty((batch, heads, block_count(tokens, block), head_dim), dtype=accumulation_dtype(query.dtype)),
        empty_bshd(query, batch, heads, tokens, state.shape[-1]),
    )


def _read_setup(ctx: FunctionCtx, inputs: tuple[object, ...], output: tuple[torch.Tensor, ...]) -> None:
    query, state, key_sum, _, _, ctx.feature_map, ctx.eps, _, rotated_query = inputs  # type: ignore[attr-defined]
    ctx.save_for_backward(query, state, key_sum, rotated_query)  # type: ignore[arg-type]
    ctx.mark_non_differentiable(output[0])


def _read_backward(
    ctx: FunctionCtx, grad_pooled: torch.Tensor, grad_out: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    query, state, key_sum, rotated_query = ctx.saved_tensors  # type: ignore[attr-defined]
    grad_query, grad_state, grad_key_sum, grad_rotated = linear_output_backward(
        grad_out,
        query,
        state,
        key_sum,
        ctx.feature_map,  # type: ignore[attr-defined]
        ctx.eps,  # type: ignore[attr-defined]
        rotated_query,
    )
    return (
        *(grad_query, grad_state, grad_key_sum),
        *(None, None, None, None, None),
        None if rotated_query is None else grad_rotated,
    )


pool_and_read.register_autograd(_read_backward, setup_context=_read_setup)
