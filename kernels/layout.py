"""Blocks of tokens, and how tensors lie in memory."""

import torch

# In the place of a query block's count: it attends to every key block, and its list of them is not kept.
ALL_BLOCKS = -1


def block_count(tokens: int, block: int) -> int:
    """ceil(tokens / block), for ints and SymInts alike."""
    return (tokens + block - 1) // block


def empty_bshd(like: torch.Tensor, batch: int, heads: int, tokens: int, head_dim: int) -> torch.Tensor:
    """An uninitialised (B, H, S, D) tensor laid out in memory as (B, S, H, D), what the model's reshape wants next."""
    return like.new_empty((batch, tokens, heads, head_dim)).transpose(1, 2)
