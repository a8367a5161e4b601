"""From "key blocks of a query block" to "query blocks of a key block", on the device and without asking it anything."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..launch import launch
from .triton_index import fill_kernel, mark_kernel

_SLOTS, _ROWS, _COLUMNS = 64, 32, 64  # tile sizes


@dataclass(frozen=True)
class InvertedIndex:
    """Which query blocks attend to a key block.

    Attributes:
        rows: int32 (B * H, Mq * K + Mq): query blocks in ascending order, one run per key block, and a last run of
            those that attend to everything and are in no other.
        start: int32 (B * H, Mk + 2), where each run begins and, last, where the last one ends.
    """

    rows: torch.Tensor
    start: torch.Tensor


def invert(lut: torch.Tensor, count: torch.Tensor, key_blocks: int) -> InvertedIndex:
    """Invert a selection: lut int32 (B, H, Mq, K) and count int32 (B, H, Mq), contiguous.

    Runs ascend, so that sums over them have one order and gradients are the same in every run.
    """
    batch, heads, query_blocks, slots = lut.shape
    groups, columns = batch * heads, key_blocks + 1
    member = torch.zeros((groups, query_blocks, columns), dtype=torch.uint8, device=lut.device)
    sizes = (slots, query_blocks, key_blocks)
    launch(mark_kernel, (query_blocks, groups), lut.device, lut, count, member, *sizes, CHUNK=_SLOTS, num_warps=1)
    start = torch.nn.functional.pad(member.sum(dim=1, dtype=torch.int32).cumsum(dim=-1), (1, 0)).to(torch.int32)
    capacity = query_blocks * (slots + 1)
    rows = lut.new_empty((groups, capacity))
    grid = (-(-columns // _COLUMNS), groups)
    tiles = {"TILE_Q": _ROWS, "TILE_K": _COLUMNS, "num_warps": 4}
    launch(fill_kernel, grid, lut.device, member, start, rows, query_blocks, columns, capacity, **tiles)
    return InvertedIndex(rows, start)
