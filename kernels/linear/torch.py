"""The fast plain-torch engine of linear attention. Runs on any device; tuned for the CPU.

Everything walks over chunks of tokens, so the features of one chunk stay in cache and the features of all tokens never
exist at once. Sums are kept in fp32 (fp64 for fp64): 16-bit matmuls return 16 bits on the CPU, and fp16 sums overflow.
"""

from collections.abc import Iterator

import torch

from ..checks import accumulation_dtype, valid_or_zero
from ..layout import empty_bshd
from ..linear_operands import Keys, Queries
from .absent import absent
from .feature_maps import find_feature_map

_CHUNK_ELEMENTS = 1 << 18  # features of one chunk: 1 MiB in fp32, half of what a core's cache commonly holds


def _chunks(x: torch.Tensor) -> Iterator[tuple[int, slice]]:
    """(batch index, run of tokens) pairs that together cover x: (B, H, S, D)."""
    batch, heads, tokens, head_dim = x.shape
    step = max(1, _CHUNK_ELEMENTS // max(1, heads * head_dim))
    for b in range(batch):
        for start in range(0, tokens, step):
            yield b, slice(start, min(start + step, tokens))


def _masked_rows(key_mask: torch.Tensor | None, b: int, run: slice) -> torch.Tensor | None:
    """(1, tokens, 1), True where a key of this chunk is masked."""
    return None if key_mask is None else ~key_mask[b, None, run, None]


def _cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x in this dtype: asking for the one that it has takes as long as a small operation."""
    return x if x.dtype == dtype else x.to(dtype)


def _keep(x: torch.Tensor, masked: torch.Tensor | None) -> torch.Tensor:
    """x with 0 in the masked rows."""
    return x if masked is None else x.masked_fill(masked, 0)


def linear_state(keys: Keys) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.linear_state`."""
    key, value, feature_map, key_mask, rotated_key = keys
    phi, _ = find_feature_map(feature_map)
    dtype = accumulation_dtype(key.dtype)
    if key.numel() <= _CHUNK_ELEMENTS:  # one chunk of all
        features = valid_or_zero(phi(_cast(key, dtype)), key_mask)
        left = features if rotated_key is None else valid_or_zero(_cast(rotated_key, dtype), key_mask)
        return left.mT @ valid_or_zero(_cast(value, dtype), key_mask), features.sum(dim=2)
    batch, heads, _, head_dim = key.shape
    state = key.new_zeros((batch, heads, head_dim, value.shape[-1]), dtype=dtype)
    key_sum = key.new_zeros((batch, heads, head_dim), dtype=dtype)
    for b, run in _chunks(key):
        masked = _masked_rows(key_mask, b, run)
        features = _keep(phi(key[b, :, run].to(dtype)), masked)
        left = features if rotated_key is None else _keep(rotated_key[b, :, run].to(dtype), masked)
        state[b].baddbmm_(left.transpose(1, 2), _keep(value[b, :, run].to(dtype), masked))
        key_sum[b] += features.sum(dim=1)
    return state, key_sum


def linear_state_backward(
    grad_state: torch.Tensor, grad_key_sum: torch.Tensor, keys: Keys
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """db_j = dKV v_j + dz, dv_j = dKV^T b_j, dk = phi'(k) db (specification 5).

    With a rotated key r_j: dr_j = dKV v_j, db_j = dz, dv_j = dKV^T r_j. Its gradient comes last, or `absent`.
    """
    key, value, feature_map, key_mask, rotated_key = keys
    phi, phi_backward = find_feature_map(feature_map)
    dtype = accumulation_dtype(key.dtype)
    grad_state, grad_key_sum = grad_state.contiguous(), grad_key_sum.contiguous()
    grad_key, grad_value = empty_bshd(key, *key.shape), empty_bshd(value, *value.shape)
    grad_rotated = absent(key) if rotated_key is None else empty_bshd(key, *key.shape)
    for b, run in _chunks(key):
        masked = _masked_rows(key_mask, b, run)
        x = key[b, :, run].to(dtype)
        features = left = phi(x)
        grad_features = grad_key_sum[b, :, None]
        from_state = torch.bmm(value[b, :, run].to(dtype), grad_state[b].transpose(1, 2))
        if rotated_key is None:
            grad_features = from_state.add_(grad_features)
        else:
            left = rotated_key[b, :, run].to(dtype)
            grad_rotated[b, :, run] = _keep(from_state, masked)
        grad_key[b, :, run] = _keep(phi_backward(grad_features, features, x), masked)
        grad_value[b, :, run] = _keep(torch.bmm(left, grad_state[b]), masked)
    return grad_key, grad_value, grad_rotated


def linear_output(queries: Queries) -> torch.Tensor:
    """See `reference.linear_output`."""
    query, state, key_sum, feature_map, eps, rotated_query = queries
    phi, _ = find_feature_map(feature_map)
    batch, heads, tokens, _ = query.shape
    out = empty_bshd(query, batch, heads, tokens, state.shape[-1])
    if query.numel() <= _CHUNK_ELEMENTS:
        features = phi(_cast(query, state.dtype))
        denominator = (features @ key_sum[..., None]).add_(eps)
        left = features if rotated_query is None else _cast(rotated_query, state.dtype)
        read = left @ state
        return torch.div(read, denominator, out=out) if out.dtype == read.dtype else out.copy_(read.div_(denominator))
    state, key_sum = state.contiguous(), key_sum.contiguous()
    for b, run in _chunks(query):
        features = phi(query[b, :, run].to(state.dtype))
        denominator = torch.bmm(features, key_sum[b, :, :, None]).add_(eps)
        left = features if rotated_query is None else rotated_query[b, :, run].to(state.dtype)
        out[b, :, run] = torch.bmm(left, state[b]).div_(denominator)
    return out


def linear_output_backward(
    grad_out: torch.Tensor, queries: Queries
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """With s_i = a_i.z + eps and w_i = KV g_i (specification 5, g.O written as w.a / s so that O need not be kept):

    ds_i = -(w_i.a_i) / s_i^2, da_i = w_i / s_i + ds_i z, dKV = sum_i a_i (g_i / s_i)^T, dz = sum_i ds_i a_i.
    With a rotated query r_i: dr_i = w_i / s_i, ds_i = -(w_i.r_i) / s_i^2, da_i = ds_i z, dKV = sum_i r_i (g_i / s_i)^T.
    """
    query, state, key_sum, feature_map, eps, rotated_query = queries
    phi, phi_backward = find_feature_map(feature_map)
    dtype = state.dtype
    state, key_sum = state.contiguous(), key_sum.contiguous()
    grad_query = empty_bshd(query, *query.shape)
    grad_rotated = absent(query) if rotated_query is None else empty_bshd(query, *query.shape)
    grad_state, grad_key_sum = torch.zeros_like(state), torch.zeros_like(key_sum)
    for b, run in _chunks(query):
        x = query[b, :, run].to(dtype)
        features = phi(x)
        left = features if rotated_query is None else rotated_query[b, :, run].to(dtype)
        denominator = torch.bmm(features, key_sum[b, :, :, None]).add_(eps)
        grad = grad_out[b, :, run].to(dtype) / denominator
        grad_features = torch.bmm(grad, state[b].transpose(1, 2))
        grad_denominator = (grad_features * left).sum(-1, keepdim=True).div_(denominator).neg_()
        if rotated_query is None:
            grad_features.baddbmm_(grad_denominator, key_sum[b, :, None])
        else:
            grad_rotated[b, :, run] = grad_features
            grad_features = torch.bmm(grad_denominator, key_sum[b, :, None])
        grad_query[b, :, run] = phi_backward(grad_features, features, x)
        grad_state[b].baddbmm_(left.transpose(1, 2), grad)
        grad_key_sum[b] += (features * grad_denominator).sum(dim=1)
    return grad_query, grad_state, grad_key_sum, grad_rotated
