"""Launch settings of the kernels, chosen with the compiler's reports, as those of linear attention are."""

from __future__ import annotations

import dataclasses

import torch

from ..capability import arch_of, padded_head_dim
from ..linear.tiles import Tiling

# kernel -> by (bytes per element, width of the wider of the two head tiles, narrower ones as 64)
_TILINGS = {
    "keys": {
        (2, 64): Tiling(64, 4, 4, 4),
        (2, 128): Tiling(64, 8, 4, 1),
    },
    "queries": {
        (2, 64): Tiling(64, 4, 3, 4),
        (2, 128): Tiling(64, 8, 4, 1),
    },
}
# What differs where tensor cores read registers only: see `linear.tiles`.
_FROM_REGISTERS = {
    ("keys", 2, 128): Tiling(32, 8, 4, 1),
    ("queries", 2, 128): Tiling(64, 8, 3, 1),
}
# The plain case on Hopper: head_dim of key and value -> settings of its kernels, whose tiles divide the blocks.
PLAIN = {
    64: {"keys": Tiling(64, 4, 4, 2), "queries": Tiling(64, 4, 3, 4)},
    128: {"keys": Tiling(64, 8, 4, 1), "queries": Tiling(64, 8, 3, 2)},
}


def tiling(kernel: str, x: torch.Tensor, value: torch.Tensor, block: int, *, ordered: bool) -> Tiling:
    """The settings of `kernel` for an input of this head_dim and dtype, and this value width; tiles divide blocks.

    ordered: whether rows are found through an order. Triton spreads the stages over both loads, that of the order and
    that of the rows, so as many tiles are on their way with twice the stages.
    """
    width = max(64, padded_head_dim(x.shape[-1]), padded_head_dim(value.shape[-1]))
    settings = _TILINGS[kernel][x.element_size(), width]
    if arch_of(x.device)[0] not in (9, 10):
        settings = _FROM_REGISTERS.get((kernel, x.element_size(), width), settings)
    stages = 2 * settings.stages - 1 if ordered else settings.stages
    return dataclasses.replace(settings, tokens=min(settings.tokens, block), stages=stages)
