"""What linear attention requires of its arguments. The `_types` functions read no sizes: fakes call them as well."""

import torch

from .. import checks
from ..checks import accumulation_dtype, require
from ..linear_operands import Keys, Queries
from .feature_maps import find_feature_map


def check_state_types(keys: Keys) -> None:
    """What can be checked of `linear_state` without reading a size."""
    key, value, feature_map, key_mask, rotated_key = keys
    checks.check_same_device(key=key, value=value, key_mask=key_mask, rotated_key=rotated_key)
    checks.check_float_4d(key=key, value=value, **_given(rotated_key=rotated_key))
    checks.check_key_mask_type(key_mask)
    find_feature_map(feature_map)


def check_state(keys: Keys) -> None:
    """Every check of `linear_state`."""
    key, value, _, key_mask, rotated_key = keys
    check_state_types(keys)
    require(
        key.shape[:3] == value.shape[:3],
        f"key {tuple(key.shape)} and value {tuple(value.shape)} must agree in batch, heads and tokens",
    )
    checks.check_key_mask(key_mask, key.shape[0], key.shape[2])
    _check_rotated("key", key, rotated_key)


def check_state_gradient(
    grad_state: torch.Tensor, grad_key_sum: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> None:
    """The gradients of a state fit the key and the value, as checked before."""
    batch, heads, _, head_dim = key.shape
    require(
        grad_state.shape == (batch, heads, head_dim, value.shape[-1]) and grad_key_sum.shape == grad_state.shape[:3],
        f"grad_state {tuple(grad_state.shape)} and grad_key_sum {tuple(grad_key_sum.shape)} do not fit the key "
        f"{tuple(key.shape)}",
    )
    expected = accumulation_dtype(key.dtype)
    for name, tensor in (("grad_state", grad_state), ("grad_key_sum", grad_key_sum)):
        require(tensor.dtype == expected, f"{name} has dtype {tensor.dtype}; a {key.dtype} key needs {expected}")


def check_output_types(queries: Queries) -> None:
    """What can be checked of `linear_output` without reading a size."""
    query, state, key_sum, feature_map, eps, rotated_query = queries
    checks.check_same_device(query=query, state=state, key_sum=key_sum, rotated_query=rotated_query)
    checks.check_float_4d(query=query, **_given(rotated_query=rotated_query))
    require(state.dim() == 4, f"state must have 4 dimensions (B, H, D, Dv), got {state.dim()}")
    require(key_sum.dim() == 3, f"key_sum must have 3 dimensions (B, H, D), got {key_sum.dim()}")
    expected = accumulation_dtype(query.dtype)
    for name, tensor in (("state", state), ("key_sum", key_sum)):
        require(
            tensor.dtype == expected,
            f"{name} has dtype {tensor.dtype}; a {query.dtype} query needs {expected}, as linear_state returns it",
        )
    find_feature_map(feature_map)
    require(eps > 0, f"eps must be positive, or a row without any positive feature divides 0 by 0; got {eps}")


def check_output(queries: Queries) -> None:
    """Every check of `linear_output`."""
    query, state, key_sum, _, _, rotated_query = queries
    check_output_types(queries)
    batch, heads, _, head_dim = query.shape
    require(
        state.shape[:3] == key_sum.shape == (batch, heads, head_dim),
        f"for a query {tuple(query.shape)}, state must be ({batch}, {heads}, {head_dim}, Dv) and key_sum "
        f"({batch}, {heads}, {head_dim}); got {tuple(state.shape)} and {tuple(key_sum.shape)}",
    )
    _check_rotated("query", query, rotated_query)


def check_output_gradient(grad_out: torch.Tensor, query: torch.Tensor, state: torch.Tensor) -> None:
    """The gradient of an output fits the query and the state, as checked before."""
    expected = (*query.shape[:3], state.shape[-1])
    require(grad_out.shape == expected, f"grad_out must be {expected}, got {tuple(grad_out.shape)}")
    require(grad_out.dtype == query.dtype, f"grad_out has dtype {grad_out.dtype} but query has {query.dtype}")


def _check_rotated(name: str, x: torch.Tensor, rotated: torch.Tensor | None) -> None:
    require(
        rotated is None or rotated.shape == x.shape,
        f"rotated_{name} must have the shape of the {name}, {tuple(x.shape)}, got "
        f"{None if rotated is None else tuple(rotated.shape)}",
    )


def _given(**tensors: torch.Tensor | None) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}
