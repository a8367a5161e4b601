"""What linear attention reads: one value each for operators, checks and engines."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Keys(NamedTuple):
    """The arguments of `linear_state`, in their order, so that `*keys` passes them.

    Attributes:
        key: (B, H, S, D). value: (B, H, S, Dv). feature_map, key_mask, rotated_key: see `linear_state`.
    """

    key: torch.Tensor
    value: torch.Tensor
    feature_map: str
    key_mask: torch.Tensor | None = None
    rotated_key: torch.Tensor | None = None


class Queries(NamedTuple):
    """The arguments of `linear_output`, in their order, so that `*queries` passes them.

    Attributes:
        query: (B, H, S, D). state: (B, H, D, Dv) and key_sum: (B, H, D) of `linear_state`. feature_map, eps,
            rotated_query: see `linear_output`.
    """

    query: torch.Tensor
    state: torch.Tensor
    key_sum: torch.Tensor
    feature_map: str
    eps: float
    rotated_query: torch.Tensor | None = None
