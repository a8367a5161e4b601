"""Launch settings of the kernels, chosen with the reports of the compiler (no spills, room for two programs)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..capability import padded_head_dim


@dataclass(frozen=True)
class Tiling:
    """Tokens per tile, warps per program, tiles in flight."""

    tokens: int
    warps: int
    stages: int


def tiling(kernel: str, x: torch.Tensor, value: torch.Tensor) -> Tiling:
    """The settings of `kernel` for inputs of this head_dim, value width and dtype."""
    widest = padded_head_dim(max(x.shape[-1], value.shape[-1]))
    return _OVERRIDE.get(kernel) or Tiling(64, 8 if widest > 64 else 4, 2)

_OVERRIDE = {}
