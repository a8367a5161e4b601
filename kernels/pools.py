"""What stands for the key blocks that a selection leaves out: one value for operators, engines and the definition."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Pools(NamedTuple):
    """The pools of one call. The fields stand in the order of the operators' arguments, so `*pools` passes them.

    Attributes:
        key, value: (B, H, P, D) and (B, H, P, Dv), a key and a value for each pool.
        tokens: fp32 (B, H, Mq, P), for how many tokens a pool stands in each query block.
        log_weight: (H,), added to the scores of each head's pools, or None for 0.
    """

    key: torch.Tensor
    value: torch.Tensor
    tokens: torch.Tensor
    log_weight: torch.Tensor | None
