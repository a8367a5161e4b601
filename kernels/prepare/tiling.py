"""Tiles of whole rows: how many rows and heads one program holds, and how wide a norm may be."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..capability import next_power

# Channels of a tile, and how many of them a thread holds: with more, registers run out.
TILE, OF_A_THREAD = 4096, 16
_HEADS = (8, 4, 2)  # of a tile where a row need not stay together
ROWS_OF_A_PROGRAM = 8  # without means


@dataclass(frozen=True)
class Tiling:
    """Heads, pairs of channels and rows of a tile, warps, rows of a program, and the most registers of a thread."""

    heads: int
    pairs: int
    rows: int
    warps: int
    run: int
    registers: int | None = None

    @classmethod
    def of(cls, heads: int, head_dim: int, dtype: torch.dtype, over_width: bool, block: int) -> Tiling:
        """For a norm over all heads, or anything else; block: of the means, or 0."""
        pairs = next_power(head_dim // 2)
        at_once = next((number for number in _HEADS if heads % number == 0), min(8, next_power(heads)))
        tile = next_power(heads) if over_width else at_once
        run = block or ROWS_OF_A_PROGRAM
        wide = 1 + (dtype.itemsize > 2)  # registers of a channel
        rows = max(1, min(run, TILE // wide // (tile * 2 * pairs)))
        of_a_thread = OF_A_THREAD // wide
        return cls(tile, pairs, rows, max(4, tile * 2 * pairs * rows // (32 * of_a_thread)), run)
