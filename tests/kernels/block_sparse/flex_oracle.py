"""Block-sparse attention through PyTorch's FlexAttention: a second definition, written by others."""

from __future__ import annotations

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from salad_compile.kernels.block_sparse.reference import block_mask
from salad_compile.kernels.layout import block_count
from salad_compile.kernels.selection import Selection


def attend_with_flex(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, selection: Selection
) -> tuple[torch.Tensor, torch.Tensor]:
    """out (B, H, S, Dv) and lse (B, H, S). Compiled on CUDA; elsewhere FlexAttention computes all S x S scores."""
    batch, _, tokens, _ = query.shape
    lut, count, query_block, key_block, scale, key_mask = selection
    member = block_mask(lut, count, block_count(tokens, key_block))
    valid = query.new_ones((batch, tokens), dtype=torch.bool) if key_mask is None else key_mask

    def visible(b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return member[b, h, i // query_block, j // key_block] & valid[b, j]

    listed = member.sum(dim=-1, dtype=torch.int32)
    ids = torch.argsort(member.to(torch.int32), dim=-1, descending=True, stable=True).to(torch.int32)
    blocks = BlockMask.from_kv_blocks(
        listed, ids, BLOCK_SIZE=(query_block, key_block), mask_mod=visible, seq_lengths=(tokens, tokens)
    )
    attend = torch.compile(flex_attention, dynamic=True) if query.is_cuda else flex_attention
    out, lse = attend(query, key, value, block_mask=blocks, scale=scale, return_lse=True)
    return out, lse
