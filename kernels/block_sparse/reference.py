"""The definition of block-sparse attention in plain torch: a dense token mask, then masked softmax; S x S memory."""

import torch

from ..checks import accumulation_dtype
from ..layout import ALL_BLOCKS, block_count
from ..selection import Selection


def block_mask(lut: torch.Tensor, count: torch.Tensor, key_blocks: int) -> torch.Tensor:
    """bool (B, H, Mq, Mk): True where the query block attends to the key block."""
    listed = torch.arange(lut.shape[-1], device=lut.device) < count[..., None]
    mask = torch.zeros((*lut.shape[:3], key_blocks + 1), dtype=torch.bool, device=lut.device)
    mask.scatter_(-1, lut.masked_fill(~listed, key_blocks).long(), True)
    return mask[..., :key_blocks] | (count == ALL_BLOCKS)[..., None]


def token_mask(selection: Selection, tokens: int) -> torch.Tensor:
    """bool (B, H, S, S): True where query token i may attend to key token j."""
    lut, count, query_block, key_block, _, key_mask = selection
    blocks = block_mask(lut, count, block_count(tokens, key_block))
    position = torch.arange(tokens, device=lut.device)
    mask = blocks[:, :, position // query_block][:, :, :, position // key_block]
    return mask if key_mask is None else mask & key_mask[:, None, None, :]


def block_sparse_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, selection: Selection
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact softmax over the selected blocks (specification 4.2, step 6); a row without any key gives 0.

    Same results as `salad::block_sparse_attention`; differentiable by autograd.
    """
    dtype = accumulation_dtype(query.dtype)
    mask = token_mask(selection, query.shape[2])
    scores = (query.to(dtype) @ key.to(dtype).transpose(-1, -2)) * selection.scale
    scores = scores.masked_fill(~mask, float("-inf"))
    lse = scores.logsumexp(dim=-1)
    empty = ~mask.any(dim=-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(empty, 0), dim=-1).masked_fill(empty, 0)
    return (weights @ value.to(dtype)).to(query.dtype), lse.detach()
