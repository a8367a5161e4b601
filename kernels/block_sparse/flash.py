"""Host side of the engine "flash": our lists of blocks as flash-attn-4 takes them. Reads no tensor's values."""

from __future__ import annotations

import contextlib

import torch

from ..engines.flash_attention import interface
from ..layout import ALL_BLOCKS, block_count
from ..selection import Selection
from .deferred import check_selection

_SMALLEST_SCALE = 2.0**-100  # of a score it leaves nothing, and of -inf it leaves -inf, which 0 would turn into NaN


def block_sparse_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, selection: Selection
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.block_sparse_attention`; only for what the engine supports.

    Its kernel reads lists from their end and hides columns beyond the last key in the first step alone: right, because
    ours are ascending and only the last block is short.
    """
    batch, heads, tokens, _ = query.shape
    lut, count, scale = selection.lut.contiguous(), selection.count.contiguous(), selection.scale
    if scale < 0:  # the kernel takes the largest score before it scales it
        query, scale = -query, -scale
    key_blocks = block_count(tokens, selection.key_block)
    check_selection(lut, count, key_blocks)
    if not query.numel() or not value.numel():
        shape = (batch, tokens, heads, value.shape[-1])
        lse = query.new_full((batch, heads, tokens), -torch.inf, dtype=torch.float32)
        return query.new_zeros(shape).transpose(1, 2), lse
    attention, lists = interface()
    blocks, counts = whole_blocks(lut, count, key_blocks)
    sparsity = lists(  # the first pair are blocks that are masked inside: none, so its list is never read
        mask_block_cnt=torch.zeros_like(counts),
        mask_block_idx=blocks,
        full_block_cnt=counts,
        full_block_idx=blocks,
        block_size=(selection.query_block, selection.key_block),
    )
    tensors = [x.transpose(1, 2) for x in (query, key, value)]
    device = torch.cuda.device(query.device) if query.is_cuda else contextlib.nullcontext()
    with torch.no_grad(), device:
        out, lse = attention(
            *tensors, softmax_scale=max(scale, _SMALLEST_SCALE), block_sparse_tensors=sparsity, return_lse=True
        )
    return out.transpose(1, 2), lse


def whole_blocks(lut: torch.Tensor, count: torch.Tensor, key_blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists that name every block they stand for, int32 (B, H, Mq, key_blocks), and their lengths, int32 (B, H, Mq).

    The package knows no ALL_BLOCKS and trusts what it is given, so such rows are written out, and wrong ids and counts
    are brought into their bounds: `check_selection` tells of them.
    """
    slots = min(lut.shape[-1], key_blocks)
    everything = count == ALL_BLOCKS
    blocks = torch.arange(key_blocks, dtype=torch.int32, device=lut.device).repeat(*count.shape, 1)
    listed = lut[..., :slots].clamp(0, key_blocks - 1)
    blocks[..., :slots] = torch.where(everything[..., None], blocks[..., :slots], listed)
    return blocks, torch.where(everything, key_blocks, count.clamp(0, slots)).int()
