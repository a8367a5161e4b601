"""Moving tokens between native order and blocks of the token order (specification 4.1)."""

import torch

# In the place of a query block's count: it attends to every key block, and its list of them is not kept.
ALL_BLOCKS = -1


def block_count(tokens: int, block: int) -> int:
    """ceil(tokens / block), for ints and SymInts alike."""
    return (tokens + block - 1) // block


def take_in_order(x: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    """(..., S, D) in native order -> (..., S, D) in token order; the input itself where order is None."""
    return x if order is None else x.index_select(-2, order)


def empty_bshd(like: torch.Tensor, batch: int, heads: int, tokens: int, head_dim: int) -> torch.Tensor:
    """An uninitialised (B, H, S, D) tensor laid out in memory as (B, S, H, D), what the model's reshape wants next."""
    return like.new_empty((batch, tokens, heads, head_dim)).transpose(1, 2)
