"""What every launch over the tokens of a (batch, head) pair needs: how many programs, partial sums, constants."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from ..capability import padded_head_dim
from ..launch import launch
from ..layout import block_count
from .tiles import Tiling
from .triton_reduce import reduce_kernel

_MULTIPROCESSORS = 132  # of an H100; stands in where kernels are interpreted or recorded
_REDUCE_TILE = 512
_REDUCE_GROUP = 8


def split_count(x: torch.Tensor, settings: Tiling) -> int:
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


def new_state(x: torch.Tensor, value: torch.Tensor, splits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialised (B, H, splits, D, Dv) and (B, H, splits, D) in fp32, x: (B, H, S, D), value: (B, H, ..., Dv)."""
    batch, heads, _, head_dim = x.shape
    shape = (batch, heads, splits, head_dim)
    return (
        x.new_empty((*shape, value.shape[-1]), dtype=torch.float32),
        x.new_empty(shape, dtype=torch.float32),
    )


def reduce_splits(state: torch.Tensor, key_sum: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum the splits of `new_state`, in their order."""
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
        GROUP=_REDUCE_GROUP,
        num_warps=4,
    )
    return whole_state, whole_sum


def constants(
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
