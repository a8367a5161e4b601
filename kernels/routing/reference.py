"""The definition of routing (method.md section 4.2) in plain torch: slow, readable, usable in fp64."""

import torch

from ..checks import accumulation_dtype
from ..layout import take_in_order


def pool_blocks(x: torch.Tensor, order: torch.Tensor | None, block: int) -> torch.Tensor:
    """Mean of the valid rows of each block: (B, H, S, D) -> (B, H, ceil(S/block), D) in fp32 (fp64 for fp64)."""
    rows = take_in_order(x, order).to(accumulation_dtype(x.dtype))
    return torch.stack([run.mean(dim=2) for run in torch.split(rows, block, dim=2)], dim=2)


def overlap(query_blocks: int, key_blocks: int, query_block: int, key_block: int) -> torch.Tensor:
    """bool (Mq, Mk): True where key block j shares a token with query block i."""
    query_start = torch.arange(query_blocks)[:, None] * query_block
    key_start = torch.arange(key_blocks)[None, :] * key_block
    return (key_start < query_start + query_block) & (query_start < key_start + key_block)


def select_blocks(
    pooled_query: torch.Tensor, pooled_key: torch.Tensor, query_block: int, key_block: int, density_permille: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep the blocks whose rank is below `keep`, where blocks that overlap the query block rank first."""
    query_blocks, key_blocks = pooled_query.shape[2], pooled_key.shape[2]
    forced = max(1, query_block // key_block)
    keep = min(key_blocks, max(forced, key_blocks * density_permille // 1000))
    scores = pooled_query @ pooled_key.transpose(-1, -2)
    forced_blocks = overlap(query_blocks, key_blocks, query_block, key_block).to(scores.device)
    scores = scores.masked_fill(forced_blocks, float("inf"))
    rank = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    kept = rank < keep
    ids = torch.arange(key_blocks, device=scores.device).expand_as(kept)
    lut = ids[kept].reshape(*kept.shape[:-1], keep)
    return lut.to(torch.int32), torch.full_like(lut[..., 0], keep, dtype=torch.int32)
