"""Host side of the Triton engine of linear attention: allocations, grids, launches. Reads no tensor's values."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from ..capability import padded_head_dim, require_supported
from ..launch import launch
from ..layout import block_count, empty_bshd
from .absent import absent
from .tiles import Tiling, tiling
from .triton_output import output_backward_kernel, output_kernel
from .triton_reduce import reduce_kernel
from .triton_state import state_backward_kernel, state_kernel

_MULTIPROCESSORS = 132  # of an H100; stands in where kernels are interpreted or recorded
_REDUCE_TILE = 512


def linear_state(
    key: torch.Tensor,
    value: torch.Tensor,
    feature_map: str,
    key_mask: torch.Tensor | None = None,
    rotated_key: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.linear_state`. One pass over the tokens, then the sum of the splits."""
    _require_supported(key, value)
    batch, heads, tokens, head_dim = key.shape
    settings = tiling("state", key, value)
    splits = _splits(key, settings)
    state, key_sum = _new_state(key, value, splits)
    launch(
        state_kernel,
        (batch * heads, splits),
        key.device,
        *(key, value, rotated_key, _bytes(key_mask), state, key_sum),
        *_strides(key, value, rotated_key),
        *(heads, tokens),
        **_constants(key, value, feature_map, settings, rotated_key),
        HAS_MASK=key_mask is not None,
    )
    return _reduced(state, key_sum)


def linear_state_backward(
    grad_state: torch.Tensor,
    grad_key_sum: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    feature_map: str,
    key_mask: torch.Tensor | None = None,
    rotated_key: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `cpu.linear_state_backward`. One pass over the tokens."""
    _require_supported(key, value)
    batch, heads, tokens, _ = key.shape
    settings = tiling("state_backward", key, value)
    grad_key, grad_value = empty_bshd(key, *key.shape), empty_bshd(value, *value.shape)
    grad_rotated = None if rotated_key is None else empty_bshd(key, *key.shape)
    launch(
        state_backward_kernel,
        (batch * heads, _splits(key, settings)),
        key.device,
        *(grad_state.contiguous(), grad_key_sum.contiguous(), key, value, rotated_key, _bytes(key_mask)),
        *(grad_key, grad_value, grad_rotated),
        *_strides(key, value, rotated_key),
        *(heads, tokens),
        **_constants(key, value, feature_map, settings, rotated_key),
        HAS_MASK=key_mask is not None,
    )
    return grad_key, grad_value, absent(key) if grad_rotated is None else grad_rotated


def linear_output(
    query: torch.Tensor,
    state: torch.Tensor,
    key_sum: torch.Tensor,
    feature_map: str,
    eps: float,
    rotated_query: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `reference.linear_output`. One pass over the tokens."""
    _require_supported(query, state)
    batch, heads, tokens, _ = query.shape
    settings = tiling("output", query, state)
    out = empty_bshd(query, batch, heads, tokens, state.shape[-1])
    launch(
        output_kernel,
        (batch * heads, _splits(query, settings)),
        query.device,
        *(query, rotated_query, state.contiguous(), key_sum.contiguous(), out),
        *_strides(query, rotated_query),
        *(heads, tokens, eps),
        **_constants(query, state, feature_map, settings, rotated_query),
    )
    return out


def linear_output_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    state: torch.Tensor,
    key_sum: torch.Tensor,
    feature_map: str,
    eps: float,
    rotated_query: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `cpu.linear_output_backward`. One pass over the tokens, then the sum of the splits."""
    _require_supported(query, state)
    batch, heads, tokens, _ = query.shape
    settings = tiling("output_backward", query, state)
    splits = _splits(query, settings)
    grad_query = empty_bshd(query, *query.shape)
    grad_rotated = None if rotated_query is None else empty_bshd(query, *query.shape)
    grad_state, grad_key_sum = _new_state(query, state, splits)
    launch(
        output_backward_kernel,
        (batch * heads, splits),
        query.device,
        *(grad_out, query, rotated_query, state.contiguous(), key_sum.contiguous()),
        *(grad_query, grad_rotated, grad_state, grad_key_sum),
        *_strides(grad_out, query, rotated_query),
        *(heads, tokens, eps),
        **_constants(query, state, feature_map, settings, rotated_query),
    )
    reduced = _reduced(grad_state, grad_key_sum)
    return grad_query, *reduced, absent(query) if grad_rotated is None else grad_rotated


def _require_supported(x: torch.Tensor, value: torch.Tensor) -> None:
    require_supported(x.device, x.dtype, x.shape[-1], value.shape[-1])


def _splits(x: torch.Tensor, settings: Tiling) -> int:
    """Programs that share the tokens of one (batch, head) pair, so that all pairs together fill the GPU once.

    More would write more partial sums, and the last of them would run alone.
    """
    batch, heads, tokens, _ = x.shape
    wanted = settings.programs * _multiprocessors(x.device) // max(1, batch * heads)
    return max(1, min(wanted, block_count(tokens, settings.tokens)))


@lru_cache(maxsize=64)
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return _MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def _new_state(x: torch.Tensor, value: torch.Tensor, splits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialised (B, H, splits, D, Dv) and (B, H, splits, D) in fp32, x: (B, H, S, D), value: (B, H, ..., Dv)."""
    batch, heads, _, head_dim = x.shape
    shape = (batch, heads, splits, head_dim)
    return (
        x.new_empty((*shape, value.shape[-1]), dtype=torch.float32),
        x.new_empty(shape, dtype=torch.float32),
    )


def _reduced(state: torch.Tensor, key_sum: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum the splits of `_new_state`, in their order."""
    batch, heads, splits, head_dim, value_dim = state.shape
    if splits == 1:
        return state.view(batch, heads, head_dim, value_dim), key_sum.view(batch, heads, head_dim)
    whole_state = state.new_empty((batch, heads, head_dim, value_dim))
    whole_sum = state.new_empty((batch, heads, head_dim))
    size = head_dim * value_dim
    launch(
        reduce_kernel,
        (batch * heads, block_count(size, _REDUCE_TILE) + 1),
        state.device,
        *(state, key_sum, whole_state, whole_sum, splits),
        STATE=size,
        HEAD_DIM=head_dim,
        TILE=_REDUCE_TILE,
        num_warps=4,
    )
    return whole_state, whole_sum


def _bytes(key_mask: torch.Tensor | None) -> torch.Tensor | None:
    return None if key_mask is None else key_mask.contiguous().view(torch.uint8)


def _strides(*tensors: torch.Tensor | None) -> tuple[int, ...]:
    """The four strides of every tensor; an absent one has some as well, for the kernels have one signature."""
    return tuple(stride for x in tensors for stride in ((0, 0, 0, 0) if x is None else x.stride()))


def _constants(
    x: torch.Tensor, value: torch.Tensor, feature_map: str, settings: Tiling, rotated: torch.Tensor | None
) -> dict[str, Any]:
    """Compile-time constants and launch options; nothing here depends on lengths."""
    return {
        "HEAD_DIM": x.shape[-1],
        "VALUE_DIM": value.shape[-1],
        "TILE_D": padded_head_dim(x.shape[-1]),
        "TILE_V": padded_head_dim(value.shape[-1]),
        "TILE_S": settings.tokens,
        "FEATURE_MAP": feature_map,
        "HAS_ROTATED": rotated is not None,
        "num_warps": settings.warps,
        "num_stages": settings.stages,
    }
