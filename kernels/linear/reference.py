"""The definition of linear attention (specification 5) in plain torch: fp64-capable, differentiable by autograd."""

import torch

from ..checks import accumulation_dtype, valid_or_zero
from ..linear_operands import Keys, Queries
from .feature_maps import find_feature_map


def linear_state(keys: Keys) -> tuple[torch.Tensor, torch.Tensor]:
    """KV = sum_j phi(k_j) v_j^T and z = sum_j phi(k_j), over the keys that are not masked.

    key (B, H, S, D), value (B, H, S, Dv), key_mask (B, S), rotated_key (B, H, S, D): in the place of phi(k_j) in KV.
    """
    key, value, feature_map, key_mask, rotated_key = keys
    phi, _ = find_feature_map(feature_map)
    dtype = accumulation_dtype(key.dtype)
    features = valid_or_zero(phi(key.to(dtype)), key_mask)
    left = features if rotated_key is None else valid_or_zero(rotated_key.to(dtype), key_mask)
    return left.transpose(-1, -2) @ valid_or_zero(value.to(dtype), key_mask), features.sum(dim=2)


def linear_output(queries: Queries) -> torch.Tensor:
    """O_i = phi(q_i)^T KV / (phi(q_i) . z + eps). query (B, H, S, D), state (B, H, D, Dv), key_sum (B, H, D).

    rotated_query (B, H, S, D): in the place of phi(q_i) in the numerator.
    """
    query, state, key_sum, feature_map, eps, rotated_query = queries
    phi, _ = find_feature_map(feature_map)
    features = phi(query.to(state.dtype))
    denominator = (features * key_sum[:, :, None]).sum(dim=-1, keepdim=True) + eps
    left = features if rotated_query is None else rotated_query.to(state.dtype)
    return ((left @ state) / denominator).to(query.dtype)
