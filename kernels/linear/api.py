"""`salad::linear_state` and `salad::linear_output`: the linear branch, with explicit backward operators.

Optional arguments come last. A backward operator returns one gradient per tensor argument that has one; for an argument
that was None it is an empty tensor of shape (0,), because operators cannot return None.
"""

from typing import Any

import torch
from torch.autograd.function import FunctionCtx

from ..autocast import without_autocast
from ..checks import accumulation_dtype
from ..differentiation import refuse_second_derivative, reverse_mode_only
from ..direct import direct
from ..engines import Call, choose, serve
from ..layout import empty_bshd
from ..linear_operands import Keys, Queries
from .absent import absent
from .checks import (
    check_output,
    check_output_gradient,
    check_output_types,
    check_state,
    check_state_gradient,
    check_state_types,
)

# --- linear_state ---------------------------------------------------------------------------------------------------


@torch.library.custom_op("salad::linear_state", mutates_args=())
@direct("salad::linear_state")
@reverse_mode_only
@without_autocast
def linear_state(
    key: torch.Tensor,
    value: torch.Tensor,
    feature_map: str,
    key_mask: torch.Tensor | None = None,
    rotated_key: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over all tokens that linear attention reads: KV = sum phi(k) v^T and z = sum phi(k) (specification 5).

    Args:
        key: (B, H, S, D), any strides; fp32, bf16, fp16 or fp64 (fp64 on the torch engine).
        value: (B, H, S, Dv), same dtype.
        feature_map: "relu" (arXiv 2601.16515, as summarised), "elu" (elu + 1) or "softmax" (over D); both our choice.
        key_mask: bool (B, S), True where a token is valid; the others leave both sums. None: all are valid.
        rotated_key: like key; the map-then-rotate placement: R phi(k'), mapped and rotated by the caller, stands in the
            place of phi(k) in KV, while z is still the sum of phi(key).

    Returns:
        state: (B, H, D, Dv) and key_sum: (B, H, D), contiguous, fp32 (fp64 for fp64).

    Raises:
        KernelArgumentError: on a wrong rank, shape, dtype or device, or an unknown feature map.
        UnsupportedKernelError: the Triton engine has no kernel for this dtype, head_dim, value width or GPU.
    """
    engine, call = serve(_describe_state, key, value, feature_map, key_mask, rotated_key)
    state, key_sum = engine.run(call, Keys(key, value, feature_map, key_mask, rotated_key))
    return state, key_sum


def _describe_state(*given: Any) -> Call:
    keys = Keys(*given)
    check_state(keys)
    return _call("linear_state", keys)


def _call(operator: str, given: Keys | Queries) -> Call:
    x, value = given[:2]  # the query or the key; the value or the state, whose last axis is as wide
    rotated = given.rotated_key if isinstance(given, Keys) else given.rotated_query
    return Call(
        operator,
        x.device,
        x.dtype,
        head_dim=x.shape[-1],
        value_dim=value.shape[-1],
        masked=isinstance(given, Keys) and given.key_mask is not None,
        feature_map=given.feature_map,
        rotated=rotated is not None,
        needs_gradient=x.requires_grad or value.requires_grad or (rotated is not None and rotated.requires_grad),
    )


@linear_state.register_fake
def _(*given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    keys = Keys(*given)
    check_state_types(keys)
    batch, heads, _, head_dim = keys.key.shape
    dtype = accumulation_dtype(keys.key.dtype)
    return (
        keys.key.new_empty((batch, heads, head_dim, keys.value.shape[-1]), dtype=dtype),
        keys.key.new_empty((batch, heads, head_dim), dtype=dtype),
    )


@torch.library.custom_op("salad::linear_state_backward", mutates_args=())
@without_autocast
def linear_state_backward(
    grad_state: torch.Tensor,
    grad_key_sum: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    feature_map: str,
    key_mask: torch.Tensor | None = None,
    rotated_key: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `linear_state` (specification 5): db = dKV v + dz, dv = dKV^T b, dk = phi'(k) db.

    Args:
        grad_state: (B, H, D, Dv) and grad_key_sum: (B, H, D), fp32 (fp64 for fp64), any strides, also expanded.
        key, value, feature_map, key_mask, rotated_key: as given to `linear_state`.

    Returns:
        grad_key (B, H, S, D), grad_value (B, H, S, Dv) and grad_rotated_key (B, H, S, D), or shape (0,) without
        rotated_key; in the dtype of the key and in (B, S, H, D) memory order. Masked keys have gradients 0.

    Raises:
        KernelArgumentError: on a wrong rank, shape, dtype or device, or an unknown feature map.
        UnsupportedKernelError: as `linear_state`.
    """
    keys = Keys(key, value, feature_map, key_mask, rotated_key)
    check_state(keys)
    check_state_gradient(grad_state, grad_key_sum, key, value)
    call = _call("linear_state_backward", keys)
    grad_key, grad_value, grad_rotated = choose(call).run(call, grad_state, grad_key_sum, keys)
    return grad_key, grad_value, grad_rotated


@linear_state_backward.register_fake
def _(grad_state: torch.Tensor, grad_key_sum: torch.Tensor, *given: Any) -> tuple[torch.Tensor, ...]:
    key, value, _, _, rotated_key = Keys(*given)
    grad_rotated = absent(key) if rotated_key is None else empty_bshd(key, *key.shape)
    return empty_bshd(key, *key.shape), empty_bshd(value, *value.shape), grad_rotated


def _state_setup(ctx: FunctionCtx, inputs: tuple[object, ...], output: object) -> None:
    key, value, ctx.feature_map, key_mask, rotated_key = inputs  # type: ignore[attr-defined]
    # never phi(key): it is as large as the key and cheap to compute again
    ctx.save_for_backward(key, value, key_mask, rotated_key)  # type: ignore[arg-type]


def _state_backward(
    ctx: FunctionCtx, grad_state: torch.Tensor, grad_key_sum: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    key, value, key_mask, rotated_key = ctx.saved_tensors  # type: ignore[attr-defined]
    given = (key, value, ctx.feature_map, key_mask, rotated_key)  # type: ignore[attr-defined]
    grad_key, grad_value, grad_rotated = linear_state_backward(grad_state, grad_key_sum, *given)
    return grad_key, grad_value, None, None, None if rotated_key is None else grad_rotated


linear_state.register_autograd(_state_backward, setup_context=_state_setup)

# --- linear_output --------------------------------------------------------------------------------------------------


@torch.library.custom_op("salad::linear_output", mutates_args=())
@direct("salad::linear_output")
@reverse_mode_only
@without_autocast
def linear_output(
    query: torch.Tensor,
    state: torch.Tensor,
    key_sum: torch.Tensor,
    feature_map: str,
    eps: float,
    rotated_query: torch.Tensor | None = None,
) -> torch.Tensor:
    """Linear attention read out for every query: phi(q) KV / (phi(q) . z + eps) (specification 5).

    A query whose features are all zero (relu of a negative row) gives exactly 0; with rotated_query it gives
    rotated_query KV / eps, which the caller's own mapping makes 0 as well.

    Args:
        query: (B, H, S, D), any strides; fp32, bf16, fp16 or fp64 (fp64 on the torch engine).
        state: (B, H, D, Dv) and key_sum: (B, H, D) from `linear_state`, fp32 (fp64 for an fp64 query).
        feature_map: as in `linear_state`.
        eps: positive; added to the denominator (1e-6 is our choice).
        rotated_query: like query; R phi(q'), in the place of phi(q) in the numerator, for a state of rotated keys.

    Returns:
        (B, H, S, Dv) in the query's dtype, laid out as a contiguous (B, S, H, Dv) seen transposed.

    Raises:
        KernelArgumentError: on a wrong rank, shape, dtype, device or eps, or an unknown feature map.
        UnsupportedKernelError: the Triton engine has no kernel for this dtype, head_dim, value width or GPU.
    """
    engine, call = serve(_describe_output, query, state, key_sum, feature_map, eps, rotated_query)
    out: torch.Tensor = engine.run(call, Queries(query, state, key_sum, feature_map, eps, rotated_query))
    return out


def _describe_output(*given: Any) -> Call:
    queries = Queries(*given)
    check_output(queries)
    return _call("linear_output", queries)


@linear_output.register_fake
def _(*given: Any) -> torch.Tensor:
    queries = Queries(*given)
    check_output_types(queries)
    batch, heads, tokens, _ = queries.query.shape
    return empty_bshd(queries.query, batch, heads, tokens, queries.state.shape[-1])


@torch.library.custom_op("salad::linear_output_backward", mutates_args=())
@without_autocast
def linear_output_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    state: torch.Tensor,
    key_sum: torch.Tensor,
    feature_map: str,
    eps: float,
    rotated_query: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `linear_output` (specification 5), computed again from its inputs.

    Args:
        grad_out: (B, H, S, Dv) in the query's dtype, any strides, also expanded.
        query, state, key_sum, feature_map, eps, rotated_query: as given to `linear_output`.

    Returns:
        grad_query (B, H, S, D) in the query's dtype and (B, S, H, D) memory order, grad_state, grad_key_sum, and
        grad_rotated_query like grad_query, or shape (0,) without rotated_query.

    Raises:
        KernelArgumentError: on a wrong rank, shape, dtype, device or eps, or an unknown feature map.
        UnsupportedKernelError: as `linear_output`.
    """
    queries = Queries(query, state, key_sum, feature_map, eps, rotated_query)
    check_output(queries)
    check_output_gradient(grad_out, query, state)
    call = _call("linear_output_backward", queries)
    grad_query, grad_state, grad_key_sum, grad_rotated = choose(call).run(call, grad_out, queries)
    return grad_query, grad_state, grad_key_sum, grad_rotated


@linear_output_backward.register_fake
def _(grad_out: torch.Tensor, *given: Any) -> tuple[torch.Tensor, ...]:
    query, state, key_sum, _, _, rotated_query = Queries(*given)
    batch, heads, head_dim, value_dim = state.shape
    return (
        empty_bshd(query, *query.shape),
        state.new_empty((batch, heads, head_dim, value_dim)),
        key_sum.new_empty((batch, heads, head_dim)),
        absent(query) if rotated_query is None else empty_bshd(query, *query.shape),
    )


def _output_setup(ctx: FunctionCtx, inputs: tuple[object, ...], output: object) -> None:
    query, state, key_sum, ctx.feature_map, ctx.eps, rotated_query = inputs  # type: ignore[attr-defined]
    ctx.save_for_backward(query, state, key_sum, rotated_query)  # type: ignore[arg-type]


def _output_backward(ctx: FunctionCtx, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    query, state, key_sum, rotated_query = ctx.saved_tensors  # type: ignore[attr-defined]
    given = (query, state, key_sum, ctx.feature_map, ctx.eps, rotated_query)  # type: ignore[attr-defined]
    grad_query, grad_state, grad_key_sum, grad_rotated = linear_output_backward(grad_out, *given)
    return grad_query, grad_state, grad_key_sum, None, None, None if rotated_query is None else grad_rotated


linear_output.register_autograd(_output_backward, setup_context=_output_setup)
refuse_second_derivative(linear_state_backward)
refuse_second_derivative(linear_output_backward)
