"""Host side of the kernels for the plain case on Hopper: when they are taken, and their launches."""

from __future__ import annotations

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from ..capability import arch_of
from ..launch import launch
from ..layout import empty_bshd
from ..linear.host import new_state, reduced, split_count
from .tiles import PLAIN
from .triton_plain import plain_keys_kernel, plain_queries_kernel


def is_plain(
    tensors: tuple[torch.Tensor, ...], value_dim: int, block: int, feature_map: str, *extras: torch.Tensor | None
) -> bool:
    """Whether these kernels take a call.

    Args:
        tensors: what is read in tiles, (B, H, S, D). value_dim: the value's head_dim.
        block: tokens per block.
        extras: order, mask and rotated rows.
    """
    first = tensors[0]
    return (
        feature_map == "relu"
        and all(extra is None for extra in extras)
        and first.dtype == torch.bfloat16
        and first.shape[-1] == value_dim
        and value_dim in PLAIN
        and all(block % settings.tokens == 0 for settings in PLAIN[value_dim].values())
        and arch_of(first.device)[0] == 9
        and all(_describable(x) for x in tensors)
    )


def summarise(
    key: torch.Tensor, value: torch.Tensor, pooled: torch.Tensor, block: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write the means of the key's blocks to pooled (B, H, M, D); return state and key_sum."""
    batch, heads, tokens, width = key.shape
    settings = PLAIN[width]["keys"]
    splits = split_count(key, settings, block)
    state, key_sum = new_state(key, value, splits)
    launch(
        plain_keys_kernel,
        (batch * heads, splits),
        key.device,
        *(_described(x, settings.tokens) for x in (key, value)),
        *(pooled, state, key_sum, heads, tokens),
        WIDTH=width,
        TILE_S=settings.tokens,
        BLOCK=block,
        ROWS=settings.warps * 32 * 8 // width,  # a thread holds 8 channels of a row: 16 bytes
        num_warps=settings.warps,
        num_stages=settings.stages,
    )
    return reduced(state, key_sum)


def read(
    query: torch.Tensor, state: torch.Tensor, key_sum: torch.Tensor, pooled: torch.Tensor, block: int, eps: float
) -> torch.Tensor:
    """Write the means of the query's blocks to pooled (B, H, M, D); return the output of linear attention."""
    batch, heads, tokens, width = query.shape
    settings, out = PLAIN[width]["queries"], empty_bshd(query, *query.shape)
    launch(
        plain_queries_kernel,
        (batch * heads, split_count(query, settings, block)),
        query.device,
        *(_described(x, settings.tokens) for x in (query, out)),
        *(state.contiguous(), key_sum.contiguous(), pooled),
        *(heads, tokens, eps),
        WIDTH=width,
        TILE_S=settings.tokens,
        BLOCK=block,
        num_warps=settings.warps,
        num_stages=settings.stages,
    )
    return out


def _described(x: torch.Tensor, rows: int) -> TensorDescriptor:
    """Of x (B, H, S, D), read or written `rows` rows of one head at a time."""
    # the stride of an axis with one entry means nothing, and may be none that the copy engine takes
    strides = [stride if size > 1 else 16 for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, rows, x.shape[-1]])


def _describable(x: torch.Tensor) -> bool:
    """Whether the bulk copy engine can read x: 16-byte aligned start and strides, none of them 0, dense channels."""
    strides = [stride * x.element_size() for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True) if size > 1]
    aligned = x.data_ptr() % 16 == 0 and all(stride > 0 and stride % 16 == 0 for stride in strides)
    return aligned and x.stride(-1) == 1
