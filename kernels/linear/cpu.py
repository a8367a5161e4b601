"""The fast plain-torch engine of linear attention. Runs on any device; tuned for the CPU.

Everything walks over chunks of tokens, so the features of one chunk stay in cache and the features of all tokens never
exist at once. Sums are kept in fp32 (fp64 for fp64): 16-bit matmuls return 16 bits on the CPU, and fp16 sums overflow.
"""

from collections.abc import Iterator

import torch

from ..checks import accumulation_dtype
from ..layout import empty_bshd
from .feature_maps import feature_map_named

_CHUNK_ELEMENTS = 1 << 18  # features of one chunk: 1 MiB in fp32, half of what a core's cache commonly holds


def _chunks(x: torch.Tensor) -> Iterator[tuple[int, slice]]:
    """(batch index, run of tokens) pairs that together cover x: (B, H, S, D)."""
    batch, heads, tokens, head_dim = x.shape
    step = max(1, _CHUNK_ELEMENTS // max(1, heads * head_dim))
    for b in range(batch):
        for start in range(0, tokens, step):
            yield b, slice(start, min(start + step, tokens))


def linear_state(key: torch.Tensor, value: torch.Tensor, feature_map: str) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.linear_state`."""
    phi, _ = feature_map_named(feature_map)
    dtype = accumulation_dtype(key.dtype)
    batch, heads, _, head_dim = key.shape
    state = key.new_zeros((batch, heads, head_dim, value.shape[-1]), dtype=dtype)
    key_sum = key.new_zeros((batch, heads, head_dim), dtype=dtype)
    for b, run in _chunks(key):
        features = phi(key[b, :, run].to(dtype))
        state[b].baddbmm_(features.transpose(1, 2), value[b, :, run].to(dtype))
        key_sum[b] += features.sum(dim=1)
    return state, key_sum


def linear_state_backward(
    grad_state: torch.Tensor, grad_key_sum: torch.Tensor, key: torch.Tensor, value: torch.Tensor, feature_map: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """db_j = dKV v_j + dz, dv_j = dKV^T b_j, dk = phi'(k) db (method.md section 5)."""
    phi, phi_backward = feature_map_named(feature_map)
    dtype = accumulation_dtype(key.dtype)
    grad_state, grad_key_sum = grad_state.contiguous(), grad_key_sum.contiguous()
    grad_key, grad_value = empty_bshd(key, *key.shape), empty_bshd(value, *value.shape)
    for b, run in _chunks(key):
        x = key[b, :, run].to(dtype)
        features = phi(x)
        grad_features = torch.baddbmm(
            grad_key_sum[b, :, None], value[b, :, run].to(dtype), grad_state[b].transpose(1, 2)
        )
        grad_key[b, :, run] = phi_backward(grad_features, features, x)
        grad_value[b, :, run] = torch.bmm(features, grad_state[b])
    return grad_key, grad_value


def linear_output(
    query: torch.Tensor, state: torch.Tensor, key_sum: torch.Tensor, feature_map: str, eps: float
) -> torch.Tensor:
    """See `reference.linear_output`."""
    phi, _ = feature_map_named(feature_map)
    batch, heads, tokens, _ = query.shape
    out = empty_bshd(query, batch, heads, tokens, state.shape[-1])
    state, key_sum = state.contiguous(), key_sum.contiguous()
    for b, run in _chunks(query):
        features = phi(query[b, :, run].to(state.dtype))
        denominator = torch.bmm(features, key_sum[b, :, :, None]).add_(eps)
        out[b, :, run] = torch.bmm(features, state[b]).div_(denominator)
    return out


def linear_output_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    state: torch.Tensor,
    key_sum: torch.Tensor,
    feature_map: str,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """With s_i = a_i.z + eps and w_i = KV g_i (method.md section 5, g.O written as w.a / s so that O need not be kept):

    ds_i = -(w_i.a_i) / s_i^2, da_i = w_i / s_i + ds_i z, dKV = sum_i a_i (g_i / s_i)^T, dz = sum_i ds_i a_i.
    """
    phi, phi_backward = feature_map_named(feature_map)
    dtype = state.dtype
    state, key_sum = state.contiguous(), key_sum.contiguous()
    grad_query = empty_bshd(query, *query.shape)
    grad_state, grad_key_sum = torch.zeros_like(state), torch.zeros_like(key_sum)
    for b, run in _chunks(query):
        x = query[b, :, run].to(dtype)
        features = phi(x)
        denominator = torch.bmm(features, key_sum[b, :, :, None]).add_(eps)
        grad = grad_out[b, :, run].to(dtype) / denominator
        grad_features = torch.bmm(grad, state[b].transpose(1, 2))
        grad_denominator = (grad_features * features).sum(-1, keepdim=True).div_(denominator).neg_()
        grad_features.baddbmm_(grad_denominator, key_sum[b, :, None])
        grad_query[b, :, run] = phi_backward(grad_features, features, x)
        grad_state[b].baddbmm_(features.transpose(1, 2), grad)
        grad_key_sum[b] += (features * grad_denominator).sum(dim=1)
    return grad_query, grad_state, grad_key_sum
