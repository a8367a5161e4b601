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


def with_dense_rows(x: torch.Tensor) -> torch.Tensor:
    """x (B, H, S, D), or a copy of it where the channels of a row do not lie side by side in memory."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def row_strides(x: torch.Tensor | None) -> tuple[int, int, int]:
    """The strides of batch, heads and tokens; 0 for an absent tensor, because a kernel has one signature."""
    return (0, 0, 0) if x is None else x.stride()[:3]  # type: ignore[return-value]
