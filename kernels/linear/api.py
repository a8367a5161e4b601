"""`salad::linear_state` and `salad::linear_output`: the linear branch, with explicit backward operators."""

import torch
from torch.autograd.function import FunctionCtx

from .. import checks
from ..checks import accumulation_dtype, require
from ..layout import empty_bshd
from . import cpu
from .feature_maps import feature_map_named


def check_state_types(key: torch.Tensor, value: torch.Tensor, feature_map: str) -> None:
    """What can be checked without reading a size; the fakes call it as well."""
    checks.check_same_device(key=key, value=value)
    checks.check_float_4d(key=key, value=value)
    feature_map_named(feature_map)


def check_state(key: torch.Tensor, value: torch.Tensor, feature_map: str) -> None:
    """Every check of `linear_state`."""
    check_state_types(key, value, feature_map)
    require(
        key.shape[:3] == value.shape[:3],
        f"key {tuple(key.shape)} and value {tuple(value.shape)} must agree in batch, heads and tokens",
    )


def check_output_types(
    query: torch.Tensor, state: torch.Tensor, key_sum: torch.Tensor, feature_map: str, eps: float
) -> None:
    """What can be checked without reading a size; the fakes call it as well."""
    checks.check_same_device(query=query, state=state, key_sum=key_sum)
    checks.check_float_4d(query=query)
    require(state.dim() == 4, f"state must have 4 dimensions (B, H, D, Dv), got {state.dim()}")
    require(key_sum.dim() == 3, f"key_sum must have 3 dimensions (B, H, D), got {key_sum.dim()}")
    expected = accumulation_dtype(query.dtype)
    for name, tensor in (("state", state), ("key_sum", key_sum)):
        require(
            tensor.dtype == expected,
            f"{name} has dtype {tensor.dtype}; a {query.dtype} query needs {expected}, as linear_state returns it",
        )
    feature_map_named(feature_map)
    require(eps > 0, f"eps must be positive, or a row without any positive feature divides 0 by 0; got {eps}")


def check_output(query: torch.Tensor, state: torch.Tensor, key_sum: torch.Tensor, feature_map: str, eps: float) -> None:
    """Every check of `linear_output`."""
    check_output_types(query, state, key_sum, feature_map, eps)
    batch, heads, _, head_dim = query.shape
    require(
        state.shape[:3] == key_sum.shape == (batch, heads, head_dim),
        f"for a query {tuple(query.shape)}, state must be ({batch}, {heads}, {head_dim}, Dv) and key_sum "
        f"({batch}, {heads}, {head_dim}); got {tuple(state.shape)} and {tuple(key_sum.shape)}",
    )


# --- linear_state ---------------------------------------------------------------------------------------------------


@torch.library.custom_op("salad::linear_state", mutates_args=())
def linear_state(key: torch.Tensor, value: torch.Tensor, feature_map: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over all tokens that linear attention reads: KV = sum phi(k) v^T and z = sum phi(k) (method.md section 5).

    Args:
        key: (B, H, S, D), any strides; fp32, bf16, fp16 or fp64.
        value: (B, H, S, Dv), same dtype.
        feature_map: "relu" (arXiv 2601.16515, as summarised), "elu" (elu + 1) or "softmax" (over D); both our choice.

    Returns:
        state: (B, H, D, Dv) and key_sum: (B, H, D), contiguous, fp32 (fp64 for fp64).

    Raises:
        KernelArgumentError: on a wrong rank, shape, dtype or device, or an unknown feature map.
    """
    check_state(key, value, feature_map)
    return cpu.linear_state(key, value, feature_map)


@linear_state.register_fake
def _(key: torch.Tensor, value: torch.Tensor, feature_map: str) -> tuple[torch.Tensor, torch.Tensor]:
    check_state_types(key, value, feature_map)
    batch, heads, _, head_dim = key.shape
    dtype = accumulation_dtype(key.dtype)
    return (
        key.new_empty((batch, heads, head_dim, value.shape[-1]), dtype=dtype),
        key.new_empty((batch, heads, head_dim), dtype=dtype),
    )


@torch.library.custom_op("salad::linear_state_backward", mutates_args=())
def linear_state_backward(
    grad_state: torch.Tensor, grad_key_sum: torch.Tensor, key: torch.Tensor, value: torch.Tensor, feature_map: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `linear_state` (method.md section 5): db = dKV v + dz, dv = dKV^T b, dk = phi'(k) db.

    Args:
        grad_state: (B, H, D, Dv) and grad_key_sum: (B, H, D), fp32 (fp64 for fp64), any strides, also expanded.
        key, value, feature_map: as given to `linear_state`.

    Returns:
        grad_key (B, H, S, D) and grad_value (B, H, S, Dv) in the dtypes of key and value, in (B, S, H, D) memory order.

    Raises:
        KernelArgumentError: on a wrong rank, shape, dtype or device, or an unknown feature map.
    """
    check_state(key, value, feature_map)
    batch, heads, _, head_dim = key.shape
    require(
        grad_state.shape == (batch, heads, head_dim, value.shape[-1]) and grad_key_sum.shape == grad_state.shape[:3],
        f"grad_state {tuple(grad_state.shape)} and grad_key_sum {tuple(grad_key_sum.shape)} do not fit the key "
        f"{tuple(key.shape)}",
    )
    return cpu.linear_state_backward(grad_state, grad_key_sum, key, value, feature_map)


@linear_state_backward.register_fake
def _(
    grad_state: torch.Tensor, grad_key_sum: torch.Tensor, key: torch.Tensor, value: torch.Tensor, feature_map: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return empty_bshd(key, *key.shape), empty_bshd(value, *value.shape)


def _state_setup(ctx: FunctionCtx, inputs: tuple[torch.Tensor, torch.Tensor, str], output: object) -> None:
    key, value, ctx.feature_map = inputs  # type: ignore[attr-defined]
    ctx.save_for_backward(key, value)  # never phi(key): it is as large as the key and cheap to compute again


def _state_backward(
    ctx: FunctionCtx, grad_state: torch.Tensor, grad_key_sum: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, None]:
    key, value = ctx.saved_tensors  # type: ignore[attr-defined]
    grad_key, grad_value = linear_state_backward(grad_state, grad_key_sum, key, value, ctx.feature_map)  # type: ignore[attr-defined]
    return grad_key, grad_value, None


linear_state.register_autograd(_state_backward, setup_context=_state_setup)

# --- linear_output --------------------------------------------------------------------------------------------------


@torch.library.custom_op("salad::linear_output", mutates_args=())
def linear_output(
    query: torch.Tensor, state: torch.Tensor, key_sum: torch.Tensor, feature_map: str, eps: float
) -> torch.Tensor:
    """Linear attention read out for every query: phi(q) KV / (phi(q) . z + eps) (method.md section 5).

    A query whose features are all zero (relu of a negative row) gives exactly 0.

    Args:
        query: (B, H, S, D), any strides; fp32, bf16, fp16 or fp64.
        state: (B, H, D, Dv) and key_sum: (B, H, D) from `linear_state`, fp32 (fp64 for an fp64 query).
        feature_map: as in `linear_state`.
        eps: positive; added to the denominator (1e-6 is our choice).

    Returns:
        (B, H, S, Dv) in the query's dtype, laid out as a contiguous (B, S, H, Dv) seen transposed.

    Raises:
        KernelArgumentError: on a wrong rank, shape, dtype, device or eps, or an unknown feature map.
    """
    check_output(query, state, key_sum, feature_map, eps)
    return cpu.linear_output(query, state, key_sum, feature_map, eps)


@linear_output.register_fake
def _(query: torch.Tensor, state: torch.Tensor, key_sum: torch.Tensor, feature_map: str, eps: float) -> torch.Tensor:
    check_output_types(query, state, key_sum, feature_map, eps)
    batch, heads, tokens, _ = query.shape
    return empty_bshd(query, batch, heads, tokens, state.shape[-1])


@torch.library.custom_op("salad::linear_output_backward", mutates_args=())
def linear_output_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    state: torch.Tensor,
    key_sum: torch.Tensor,
    feature_map: str,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `linear_output` (method.md section 5), computed again from its inputs.

    Args:
        grad_out: (B, H, S, Dv) in the query's dtype, any strides, also expanded.
        query, state, key_sum, feature_map, eps: as given to `linear_output`.

    Returns:
        grad_query (B, H, S, D) in the query's dtype and (B, S, H, D) memory order, grad_state and grad_key_sum.

    Raises:
        KernelArgumentError: on a wrong rank, shape, dtype, device or eps, or an unknown feature map.
    """
    check_output(query, state, key_sum, feature_map, eps)
    expected = (*query.shape[:3], state.shape[-1])
    require(grad_out.shape == expected, f"grad_out must be {expected}, got {tuple(grad_out.shape)}")
    return cpu.linear_output_backward(grad_out, query, state, key_sum, feature_map, eps)


@linear_output_backward.register_fake
def _(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    state: torch.Tensor,
    key_sum: torch.Tensor,
    feature_map: str,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, heads, head_dim, value_dim = state.shape
    return (
        empty_bshd(query, *query.shape),
        state.new_empty((batch, heads, head_dim, value_dim)),
        key_sum.new_empty((batch, heads, head_dim)),
    )


def _output_setup(
    ctx: FunctionCtx, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor, str, float], output: object
) -> None:
    query, state, key_sum, ctx.feature_map, ctx.eps = inputs  # type: ignore[attr-defined]
    ctx.save_for_backward(query, state, key_sum)


def _output_backward(
    ctx: FunctionCtx, grad_out: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None, None]:
    query, state, key_sum = ctx.saved_tensors  # type: ignore[attr-defined]
    grads = linear_output_backward(grad_out, query, state, key_sum, ctx.feature_map, ctx.eps)  # type: ignore[attr-defined]
    return (*grads, None, None)


linear_output.register_autograd(_output_backward, setup_context=_output_setup)
