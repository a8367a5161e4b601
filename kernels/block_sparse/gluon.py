"""Host side of the Gluon engine of block-sparse attention: Hopper, bf16. Reads no tensor's values."""

from __future__ import annotations

import math
from typing import Any

import torch
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..launch import launch, recording
from ..layout import block_count, empty_bshd
from ..pools import Pools
from ..repairs import count_tiles
from ..selection import Selection
from .deferred import check_selection
from .gluon_backward import block_sparse_attention_backward
from .gluon_host import describe, describe_rows, multiprocessors, pack_mask
from .gluon_kernel import gluon_forward_kernel
from .gluon_pools import bias_of
from .gluon_settings import KEY_BLOCK, Settings, settings_of

__all__ = ["attend", "block_sparse_attention", "block_sparse_attention_backward"]

_SMALLEST_SCALE = 2.0**-100  # of a score it leaves nothing, and of -inf it leaves -inf, which 0 would turn into NaN


def block_sparse_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, selection: Selection
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.block_sparse_attention`; only for what the engine supports."""
    return attend(query, key, value, selection)


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, selection: Selection, pools: Pools | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, or, with pools, `tail.reference.attend_with_tail`.

    Without a mask there are two launches: the second computes again, with the online softmax, the tiles whose scores
    grew too far beyond those of their first step. Mostly there is none, and it ends at once.
    """
    batch, heads, tokens, head_dim = query.shape
    selection = selection.contiguous()
    lut, count, scale = selection.lut, selection.count, selection.scale
    if scale < 0:  # the kernels take the largest score before they scale it
        query, scale = -query, -scale
    check_selection(lut, count, block_count(tokens, KEY_BLOCK))
    out = empty_bshd(query, batch, heads, tokens, head_dim)
    lse = query.new_empty((batch, heads, tokens), dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    total, masked = count.numel(), selection.key_mask is not None
    mask = redo = counts = None
    if selection.key_mask is not None:
        mask = pack_mask(selection.key_mask)
    else:
        redo = lut.new_zeros(1 + 2 * total)
        counts = lut.new_empty(2, dtype=torch.int64) if recording() else count_tiles(query.device, total)
    scale_log2 = max(scale, _SMALLEST_SCALE) * math.log2(math.e)
    settings = settings_of(head_dim, selection.query_block, masked=masked, pooled=pools is not None)
    pooled: tuple[TensorDescriptor | None, ...] = (None, None, None)
    if pools is not None:
        bias = bias_of(pools, 1 / scale_log2)  # scores have their scale to come
        pooled = (describe(pools.key), describe(pools.value), describe_rows(bias, settings.step))
    arguments = (*map(describe, (query, key, value, out)), *pooled, lse, lut, count, mask, redo, counts)
    lengths = (lut.shape[2], heads, total, lut.shape[-1], tokens, 0 if pools is None else pools.key.shape[2])
    grid = (min(multiprocessors(query.device), -(-total // settings.rings)),)

    def run(settings: Settings) -> None:
        options: dict[str, Any] = {"num_warps": 4, "SETTINGS": settings}
        launch(gluon_forward_kernel, grid, query.device, *arguments, *lengths, scale_log2, **options)

    run(settings)
    if not masked:
        run(settings_of(head_dim, selection.query_block, masked=False, pooled=pools is not None, repair=True))
    return out, lse
