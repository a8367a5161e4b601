"""Host side of the Triton engine of routing: allocations, grids, launches. Reads no tensor's values."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..block_choice import BlockChoice
from ..capability import padded_head_dim
from ..launch import launch
from ..layout import ALL_BLOCKS, block_count, empty_lists, has_aligned_rows, mask_bytes, row_strides, with_dense_rows
from .density import list_width, touched_blocks
from .triton_pool import pool_kernel, valid_blocks_kernel
from .triton_select import select_kernel

# Rows of a tile that is loaded at once.
POOL_ROWS = 32
# Scores of a row that are read at once, and how many times as many stay in registers.
SELECT_TILE, SELECT_TILES = 256, 8
# Scores in memory at once, 128 MB: heads beyond that come after one another.
SCORES_AT_ONCE = 1 << 25


def pool_blocks(x: torch.Tensor, block: int, key_mask: torch.Tensor | None = None) -> torch.Tensor:
    """See `reference.pool_blocks`."""
    x = with_dense_rows(x)
    batch, heads, tokens, head_dim = x.shape
    blocks = block_count(tokens, block)
    pooled = x.new_empty((batch, heads, blocks, head_dim), dtype=torch.float32)
    mask = mask_bytes(key_mask)
    launch(
        pool_kernel,
        (batch * blocks * heads,),
        x.device,
        *(x, mask, pooled, row_strides(x), heads, tokens, blocks),
        HEAD_DIM=head_dim,
        TILE_D=padded_head_dim(head_dim),
        BLOCK=block,
        ROWS=min(block, POOL_ROWS),
        HAS_MASK=mask is not None,
        num_warps=4 if has_aligned_rows(x) else 8,  # narrow loads take registers
    )
    return pooled


def select_blocks(
    pooled_query: torch.Tensor, pooled_key: torch.Tensor, choice: BlockChoice
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.select_blocks`. Scores are one product of the library, in the precision that torch is set to."""
    query, key = pooled_query.flatten(0, 1), pooled_key.flatten(0, 1).transpose(1, 2)

    def fill(heads: slice, scores: torch.Tensor) -> None:
        torch.bmm(query[heads], key[heads], out=scores[:, :, : key.shape[2]])

    return keep_best(fill, pooled_query, (*pooled_query.shape[:3], pooled_key.shape[2]), choice)


def keep_best(
    fill: Callable[[slice, torch.Tensor], None],
    like: torch.Tensor,
    shape: tuple[int, int, int, int],
    choice: BlockChoice,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The blocks with the best scores, as of `reference.select_blocks`.

    Args:
        fill: writes the scores of a slice of the B * H heads into the first Mk columns of fp32 (heads, Mq, width).
        like: a tensor of the device. shape: (B, H, Mq, Mk).
    """
    query_block, key_block, density_permille, sink_begin, sink_end, key_mask, permille = choice
    batch, heads, query_blocks, key_blocks = shape
    slots = list_width(key_blocks, query_block, key_block, density_permille, sink_begin, sink_end)
    lut, count = empty_lists(like, batch, heads, query_blocks, slots)
    width = block_count(key_blocks, 16) * 16  # of a row in memory: a vector never crosses its end
    valid = None
    if key_mask is not None:
        valid = _valid_blocks(key_mask, key_block, width)
        valid = valid[:, None].expand(batch, heads, width).reshape(batch * heads, width).contiguous()
    text = (*touched_blocks(sink_begin, sink_end, key_block), *touched_blocks(sink_begin, sink_end, query_block))
    group = max(1, SCORES_AT_ONCE // (query_blocks * width))
    for first in range(0, batch * heads, group):
        part = slice(first, min(first + group, batch * heads))
        scores = like.new_empty((part.stop - first, query_blocks, width), dtype=torch.float32)
        fill(part, scores)
        launch(
            select_kernel,
            (scores.shape[0] * query_blocks,),
            scores.device,
            *(scores, None if valid is None else valid[part], lut.flatten(0, 1)[part], count.flatten(0, 1)[part]),
            permille,
            *(width, query_blocks, key_blocks, slots, query_block, key_block, *text),
            HAS_MASK=valid is not None,
            HAS_PERMILLE=permille is not None,
            TILE=SELECT_TILE,
            TILES=SELECT_TILES,
            ALL_BLOCKS=ALL_BLOCKS,
            num_warps=1,
        )
    return lut, count


def _valid_blocks(key_mask: torch.Tensor, block: int, width: int) -> torch.Tensor:
    """uint8 (B, width): 1 where a block has a valid key; the columns after the last block hold nothing."""
    batch, tokens = key_mask.shape
    valid = key_mask.new_empty((batch, width), dtype=torch.uint8)
    launch(
        valid_blocks_kernel,
        (block_count(tokens, block), batch),
        key_mask.device,
        *(mask_bytes(key_mask), valid, tokens, width, block),
        CHUNK=128,
        num_warps=1,
    )
    return valid
