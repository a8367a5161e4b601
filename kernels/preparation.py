"""What becomes of projected rows on their way to attention: one value for operator, checks and engines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Preparation(NamedTuple):
    """The arguments of `prepare_operand` behind the rows, in their order, so that `*preparation` passes them.

    Attributes:
        tables: cos and sin, or four; (B or 1, H or 1, S or 1, P) of P pairs of channels.
        pairs, norm, over, eps, feature_map, block: see `prepare_operand`.
        weight, bias: (D,) or (H * D,), of the norm, or None.
        order, inverse: int32 (S,), a permutation and its inverse, or None.
    """

    tables: Sequence[torch.Tensor]
    pairs: str
    norm: str
    over: str
    eps: float
    feature_map: str
    block: int
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    order: torch.Tensor | None = None
    inverse: torch.Tensor | None = None
