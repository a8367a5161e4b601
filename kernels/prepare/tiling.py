"""Tiles of the kernel: how many rows a program takes, and how many heads at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..capability import next_power

# Channels that a thread holds at once: with more, registers run out, with fewer, addresses take the time.
OF_A_THREAD = 16
WARPS = 4
_HEADS = (8, 4, 2, 1)
_ROWS = 2


@dataclass(frozen=True)
class Tiling:
    """Heads, pairs of channels and rows of a tile, warps, and the most registers of a thread."""

    heads: int
    pairs: int
    rows: int
    warps: int
    registers: int | None = None

    @classmethod
    def of(cls, heads: int, head_dim: int, dtype: torch.dtype) -> Tiling:
        """For x of this shape; heads are taken in groups that are full where that is possible."""
        pairs = next_power(head_dim // 2)
        group = next(number for number in _HEADS if heads % number == 0)
        group = 4 if group == 1 and heads > 4 else group
        channels = WARPS * 32 * (OF_A_THREAD if dtype.itemsize <= 2 else OF_A_THREAD // 2)
        channels //= 1 + (2 * pairs != head_dim)  # masks take registers
        return cls(group, pairs, max(1, min(_ROWS, channels // (group * 2 * pairs))), WARPS)
