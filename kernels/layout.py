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


def empty_lists(
    like: torch.Tensor, batch: int, heads: int, query_blocks: int, slots: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialised lut (B, H, Mq, K) and count (B, H, Mq), int32; see `Selection`."""
    shape = (batch, heads, query_blocks)
    return like.new_empty((*shape, slots), dtype=torch.int32), like.new_empty(shape, dtype=torch.int32)


def mask_bytes(key_mask: torch.Tensor | None) -> torch.Tensor | None:
    """A key mask as kernels read it: uint8 (B, S), contiguous; or None."""
    return None if key_mask is None else key_mask.contiguous().view(torch.uint8)


def with_dense_rows(x: torch.Tensor) -> torch.Tensor:
    """x (B, H, S, D), or a copy of it where the channels of a row do not lie side by side in memory."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def has_aligned_rows(x: torch.Tensor) -> bool:
    """Whether every row of x starts where 16 bytes can be read at once."""
    return x.data_ptr() % 16 == 0 and all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:3])


def describable(x: torch.Tensor) -> bool:
    """Whether the bulk copy engine can read x (B, H, S, D): aligned start and strides, none of them 0, dense channels.

    Aligned is what is a multiple of 16 bytes.
    """
    strides = [stride * x.element_size() for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True) if size > 1]
    aligned = x.data_ptr() % 16 == 0 and all(stride > 0 and stride % 16 == 0 for stride in strides)
    return aligned and x.stride(-1) == 1


def descriptor_strides(x: torch.Tensor) -> list[int]:
    """The strides of x (B, H, S, D) for a descriptor, in entries.

    The stride of an axis with one entry means nothing, and may be none that the copy engine takes.
    """
    return [*(stride if size > 1 else 16 for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True)), 1]


def row_strides(x: torch.Tensor | None) -> tuple[int, int, int]:
    """The strides of batch, heads and tokens; 0 for an absent tensor, because a kernel has one signature."""
    return (0, 0, 0) if x is None else x.stride()[:3]  # type: ignore[return-value]
