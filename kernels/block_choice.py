"""How key blocks are chosen for every query block: one value for the operator, its checks and its engines."""

from __future__ import annotations

from typing import NamedTuple

import torch


class BlockChoice(NamedTuple):
    """The arguments of `select_blocks` behind its means, in their order, so that `*choice` passes them.

    Attributes:
        query_block, key_block, density_permille, sink_begin, sink_end, key_mask, permille: see `select_blocks`.
    """

    query_block: int
    key_block: int
    density_permille: int
    sink_begin: int = 0
    sink_end: int = 0
    key_mask: torch.Tensor | None = None
    permille: torch.Tensor | None = None
