"""What block-sparse attention is told about the keys: one value for operators, engines and those who look on."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Selection(NamedTuple):
    """Which keys every query block attends to, and how.

    The fields stand in the order of the operators' arguments after the tensors, so `*selection` passes them.

    Attributes:
        lut: int32 (B, H, Mq, K), ascending ids of the selected key blocks, Mq = ceil(S / query_block).
        count: int32 (B, H, Mq), valid entries per row of lut, or ALL_BLOCKS (-1).
        query_block, key_block: tokens per block; only the last one is short.
        scale: factor on the scores.
        key_mask: bool (B, S), True where a key is valid; None where all are.
    """

    lut: torch.Tensor
    count: torch.Tensor  # type: ignore[assignment]  # hides tuple.count
    query_block: int
    key_block: int
    scale: float
    key_mask: torch.Tensor | None = None
