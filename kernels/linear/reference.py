"""The definition of linear attention (method.md section 5) in plain torch: fp64-capable, differentiable by autograd."""

import torch

from ..checks import accumulation_dtype
from .feature_maps import feature_map_named


def linear_state(key: torch.Tensor, value: torch.Tensor, feature_map: str) -> tuple[torch.Tensor, torch.Tensor]:
    """KV = sum_j phi(k_j) v_j^T and z = sum_j phi(k_j). key (B, H, S, D), value (B, H, S, Dv)."""
    phi, _ = feature_map_named(feature_map)
    dtype = accumulation_dtype(key.dtype)
    features = phi(key.to(dtype))
    return features.transpose(-1, -2) @ value.to(dtype), features.sum(dim=2)


def linear_output(
    query: torch.Tensor, state: torch.Tensor, key_sum: torch.Tensor, feature_map: str, eps: float
) -> torch.Tensor:
    """O_i = phi(q_i)^T KV / (phi(q_i) . z + eps). query (B, H, S, D), state (B, H, D, Dv), key_sum (B, H, D)."""
    phi, _ = feature_map_named(feature_map)
    features = phi(query.to(state.dtype))
    denominator = (features * key_sum[:, :, None]).sum(dim=-1, keepdim=True) + eps
    return ((features @ state) / denominator).to(query.dtype)


def quadratic_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, feature_map: str, eps: float
) -> torch.Tensor:
    """The same sum written with all S x S weights, which is what the two functions above must add up to."""
    phi, _ = feature_map_named(feature_map)
    dtype = accumulation_dtype(query.dtype)
    weights = phi(query.to(dtype)) @ phi(key.to(dtype)).transpose(-1, -2)
    return ((weights @ value.to(dtype)) / (weights.sum(dim=-1, keepdim=True) + eps)).to(query.dtype)
