"""From "key blocks of a query block" to "query blocks of a key block", on the device and without asking it anything."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class InvertedIndex:
    """Which query blocks attend to a key block.

    Attributes:
        rows: int32 (B * H, Mq * K), query blocks in ascending order, one run per key block.
        start: int32 (B * H, Mk + 1), where the run of each key block begins; the last entry is where all of them end.
        dense_rows: int32 (B * H, Mq), the query blocks that attend to everything come first; these are in no run.
        dense_count: int32 (B * H,), how many those are.
    """

    rows: torch.Tensor
    start: torch.Tensor
    dense_rows: torch.Tensor
    dense_count: torch.Tensor


def invert(lut: torch.Tensor, count: torch.Tensor, key_blocks: int) -> InvertedIndex:
    """Invert a selection: lut int32 (B, H, Mq, K) and count int32 (B, H, Mq).

    A stable sort, so that sums over a run have one order and gradients are the same on every run.
    """
    batch, heads, query_blocks, slots = lut.shape
    unused = torch.arange(slots, device=lut.device, dtype=torch.int32) >= count[..., None]
    # unused slots sort behind every key block; so do wrong ids, which must not point outside either
    ids = lut.masked_fill(unused | (lut < 0) | (lut > key_blocks), key_blocks).view(batch * heads, query_blocks * slots)
    ids, slot = torch.sort(ids, dim=-1, stable=True)
    bounds = torch.arange(key_blocks + 1, device=lut.device, dtype=torch.int32).expand(batch * heads, -1).contiguous()
    dense = (count < 0).view(batch * heads, query_blocks)
    return InvertedIndex(
        rows=(slot // slots).to(torch.int32),
        start=torch.searchsorted(ids, bounds, out_int32=True),
        dense_rows=torch.sort(dense, dim=-1, descending=True, stable=True).indices.to(torch.int32),
        dense_count=dense.sum(dim=-1, dtype=torch.int32),
    )
