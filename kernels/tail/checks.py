"""What the operators of the tail require of their arguments."""

import torch

from ..checks import check_block, check_float_4d, check_same_device, require
from ..pools import Pools


def check_pool_size(pool: int, key_block: int) -> None:
    """A pool is a positive number of tokens, and whole blocks make whole pools or the reverse."""
    check_block("key_block", key_block)
    require(
        pool > 0 and (pool % key_block == 0 or key_block % pool == 0),
        f"one of pool={pool} and key_block={key_block} must divide the other",
    )


def check_video(begin: int, end: int, tokens: int) -> None:
    """The tokens that pools are made of lie among all."""
    require(0 <= begin <= end <= tokens, f"the video [{begin}, {end}) must lie within {tokens} tokens")


def check_pools(
    query: torch.Tensor,
    value: torch.Tensor,
    lut: torch.Tensor,
    given: Pools,
) -> None:
    """Every check of what `attend_with_tail` takes beyond block-sparse attention."""
    pooled_key, pooled_value, pool_tokens, log_weight = given
    check_float_4d(query=query, pooled_key=pooled_key, pooled_value=pooled_value)
    check_same_device(
        query=query, pooled_key=pooled_key, pooled_value=pooled_value, pool_tokens=pool_tokens, log_weight=log_weight
    )
    (batch, heads, _, head_dim), pools = query.shape, pooled_key.shape[2]
    require(
        pooled_key.shape == (batch, heads, pools, head_dim) and pools > 0,
        f"pooled_key must be ({batch}, {heads}, P, {head_dim}) with P >= 1, got {tuple(pooled_key.shape)}",
    )
    expected = (batch, heads, pools, value.shape[-1])
    require(pooled_value.shape == expected, f"pooled_value must be {expected}, got {tuple(pooled_value.shape)}")
    rows = (*lut.shape[:3], pools)
    require(pool_tokens.shape == rows, f"pool_tokens must be {rows}, got {tuple(pool_tokens.shape)}")
    require(pool_tokens.dtype == torch.float32, f"pool_tokens must be float32, got {pool_tokens.dtype}")
    require(
        log_weight is None or (log_weight.shape == (heads,) and log_weight.dtype in (torch.float32, torch.float64)),
        f"log_weight must be float32 or float64 ({heads},), got "
        f"{None if log_weight is None else (log_weight.dtype, tuple(log_weight.shape))}",
    )
