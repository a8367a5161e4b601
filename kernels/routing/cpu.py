"""The fast plain-torch engine of routing. Runs on any device; tuned for the CPU."""

import torch

from ..checks import accumulation_dtype
from ..layout import block_count
from .density import kept_blocks


def pool_blocks(x: torch.Tensor, order: torch.Tensor | None, block: int) -> torch.Tensor:
    """See `reference.pool_blocks`. Full blocks are one strided reduction, the short last block a second one."""
    batch, heads, tokens, head_dim = x.shape
    dtype = accumulation_dtype(x.dtype)
    if order is not None:
        # (B, S, H, D) rows are contiguous in the usual layout, so the gather is made along S of that view
        x = x.transpose(1, 2).index_select(1, order).transpose(1, 2)
    full = tokens // block
    pooled = x.new_empty((batch, heads, block_count(tokens, block), head_dim), dtype=dtype)
    if full:
        rows = torch.unflatten(x[:, :, : full * block], 2, (full, block))
        torch.mean(rows, dim=3, dtype=dtype, out=pooled[:, :, :full])
    if full * block < tokens:
        torch.mean(x[:, :, full * block :], dim=2, dtype=dtype, out=pooled[:, :, full])
    return pooled


def select_blocks(
    pooled_query: torch.Tensor, pooled_key: torch.Tensor, query_block: int, key_block: int, density_permille: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.select_blocks`. Forced blocks score +inf, everything else stays below it, then one top-k."""
    key_blocks = pooled_key.shape[2]
    keep = kept_blocks(key_blocks, query_block, key_block, density_permille)
    scores = pooled_query @ pooled_key.transpose(-1, -2)
    # An overflow must not tie with a forced block, and NaN must not outrank it: the self block is always selected.
    scores.nan_to_num_(nan=torch.finfo(scores.dtype).min, posinf=torch.finfo(scores.dtype).max)
    _force_overlap(scores, query_block, key_block)
    lut = scores.topk(keep, dim=-1, sorted=False).indices.sort(dim=-1).values.to(torch.int32)
    return lut, torch.full(lut.shape[:3], keep, dtype=torch.int32, device=lut.device)


def _force_overlap(scores: torch.Tensor, query_block: int, key_block: int) -> None:
    """Set the score of every key block that overlaps its query block to +inf, in place."""
    query_blocks, key_blocks = scores.shape[-2:]
    query_start = torch.arange(query_blocks, device=scores.device)[:, None] * query_block
    key_start = torch.arange(key_blocks, device=scores.device)[None, :] * key_block
    overlap = (key_start < query_start + query_block) & (query_start < key_start + key_block)
    scores.masked_fill_(overlap, float("inf"))
