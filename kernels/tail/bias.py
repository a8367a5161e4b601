"""What is added to the scores of pools: each stands for many tokens, or for none."""

import torch

from ..checks import accumulation_dtype


def bias_of(pool_tokens: torch.Tensor, log_weight: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """(B, H, Mq, P) in the dtype that sums of `dtype` are kept in; -inf where a pool stands for nothing.

    Args:
        pool_tokens: (B, H, Mq, P), see `reference.tail_tokens`.
        log_weight: (H,), or None for 0.
    """
    bias = pool_tokens.to(accumulation_dtype(dtype)).log()
    return bias if log_weight is None else bias + log_weight[:, None, None].to(bias.dtype)
