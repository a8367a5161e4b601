"""Host side of the Gluon engine of block-sparse attention: Hopper, bf16. Reads no tensor's values."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..launch import launch, recording
from ..layout import block_count, empty_bshd
from ..repairs import count_tiles
from ..selection import Selection
from .deferred import check_selection
from .gluon_backward import block_sparse_attention_backward
from .gluon_host import describe, multiprocessors, pack_mask
from .gluon_kernel import gluon_forward_kernel
from .gluon_settings import KEY_BLOCK, Settings, settings_of

__all__ = ["block_sparse_attention", "block_sparse_attention_backward"]

_SMALLEST_SCALE = 2.0**-100  # of a score it leaves nothing, and of -inf it leaves -inf, which 0 would turn into NaN


def block_sparse_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, selection: Selection
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.block_sparse_attention`; only for what the engine supports.

    Without a mask there are two launches: the second computes again, with the online softmax, the tiles whose scores
    grew too far beyond those of their first step. Mostly there is none, and it ends at once.
    """
    batch, heads, tokens, head_dim = query.shape
    lut, count, scale = selection.lut.contiguous(), selection.count.contiguous(), selection.scale
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
    arguments = (*map(describe, (query, key, value, out)), lse, lut, count, mask, redo, counts)
    lengths = (lut.shape[2], heads, total, lut.shape[-1], tokens)

    def run(settings: Settings) -> None:
        grid = (min(multiprocessors(query.device), -(-total // settings.rings)),)
        options: dict[str, Any] = {"num_warps": 4, "SETTINGS": settings}
        scale_log2 = max(scale, _SMALLEST_SCALE) * math.log2(math.e)
        launch(gluon_forward_kernel, grid, query.device, *arguments, *lengths, scale_log2, **options)

    run(settings_of(head_dim, selection.query_block, masked=masked))
    if not masked:
        run(settings_of(head_dim, selection.query_block, masked=False, repair=True))
    return out, lse
