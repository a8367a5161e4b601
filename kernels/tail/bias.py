"""What is added to the scores of pools: each stands for many tokens, or for none."""

import torch

from ..checks import accumulation_dtype
from ..pools import Pools


def bias_of(pools: Pools, dtype: torch.dtype) -> torch.Tensor:
    """(B, H, Mq, P) in the dtype that sums of `dtype` are kept in; -inf where a pool stands for nothing."""
    bias = pools.tokens.to(accumulation_dtype(dtype)).log()
    return bias if pools.log_weight is None else bias + pools.log_weight[:, None, None].to(bias.dtype)
