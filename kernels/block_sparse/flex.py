"""Block-sparse attention through PyTorch's FlexAttention: a second opinion on the Triton kernels, forward only."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from ..checks import accumulation_dtype
from ..errors import UnsupportedKernelError
from ..layout import block_count, empty_bshd
from .reference import block_mask


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lut: torch.Tensor,
    count: torch.Tensor,
    query_block: int,
    key_block: int,
    scale: float,
    key_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.block_sparse_attention`. Compiled on CUDA; elsewhere FlexAttention computes all S x S scores."""
    batch, heads, tokens, _ = query.shape
    member = block_mask(lut, count, block_count(tokens, key_block))
    valid = query.new_ones((batch, tokens), dtype=torch.bool) if key_mask is None else key_mask

    def visible(b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return member[b, h, i // query_block, j // key_block] & valid[b, j]

    from torch.nn.attention.flex_attention import BlockMask

    listed = member.sum(dim=-1, dtype=torch.int32)
    ids = torch.argsort(member.to(torch.int32), dim=-1, descending=True, stable=True).to(torch.int32)
    blocks = BlockMask.from_kv_blocks(
        listed, ids, BLOCK_SIZE=(query_block, key_block), mask_mod=visible, seq_lengths=(tokens, tokens)
    )
    tensors = (x.detach() for x in (query, key, value))
    found, found_lse = _flex_attention(query.device.type)(*tensors, block_mask=blocks, scale=scale, return_lse=True)
    out = empty_bshd(query, batch, heads, tokens, value.shape[-1])
    lse = query.new_empty((batch, heads, tokens), dtype=accumulation_dtype(query.dtype))
    for target, result in ((out, found), (lse, found_lse)):
        target.copy_(result)
    return out, lse


def backward(*arguments: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """There is none: inside an operator autograd does not record, and FlexAttention has no backward on the CPU."""
    raise UnsupportedKernelError(
        "the flex engine of block-sparse attention has no backward: it is a cross-check of the forward. Leave "
        "use_engine('flex'), or use_engine('torch') for a second opinion on gradients"
    )


@lru_cache(maxsize=2)
def _flex_attention(device_type: str) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if device_type == "cuda" else flex_attention
