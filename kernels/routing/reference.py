"""The definition of routing (specification 4.2) in plain torch: slow, readable, usable in fp64."""

import torch

from ..block_choice import BlockChoice
from ..checks import accumulation_dtype
from ..layout import ALL_BLOCKS


def pool_blocks(x: torch.Tensor, block: int, key_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean of the valid rows of each block: (B, H, S, D) -> (B, H, ceil(S/block), D) in fp32 (fp64 for fp64)."""
    rows = x.to(accumulation_dtype(x.dtype))
    if key_mask is None:
        key_mask = torch.ones(x.shape[0], x.shape[2], dtype=torch.bool, device=x.device)
    valid = key_mask[:, None, :, None]
    return torch.stack(
        [
            run.masked_fill(~seen, 0).sum(dim=2) / seen.sum(dim=2).clamp(min=1)
            for run, seen in zip(torch.split(rows, block, dim=2), torch.split(valid, block, dim=2), strict=True)
        ],
        dim=2,
    )


def overlap(query_blocks: int, key_blocks: int, query_block: int, key_block: int) -> torch.Tensor:
    """bool (Mq, Mk): True where key block j shares a token with query block i."""
    query_start = torch.arange(query_blocks)[:, None] * query_block
    key_start = torch.arange(key_blocks)[None, :] * key_block
    return (key_start < query_start + query_block) & (query_start < key_start + key_block)


def hold_tokens(blocks: int, block: int, begin: int, end: int) -> torch.Tensor:
    """bool (M,): True where a block has a token in [begin, end)."""
    start = torch.arange(blocks) * block
    return (start < end) & (begin < start + block) & (begin < end)


def valid_blocks(key_mask: torch.Tensor, block: int) -> torch.Tensor:
    """bool (B, Mk): True where a block has a valid key."""
    return torch.stack([run.any(dim=1) for run in torch.split(key_mask, block, dim=1)], dim=1)


def select_blocks(
    pooled_query: torch.Tensor, pooled_key: torch.Tensor, choice: BlockChoice
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rank the valid blocks, those that overlap the query block and sinks first, and keep ranks below K."""
    query_block, key_block, density_permille, sink_begin, sink_end, key_mask, permille = choice
    batch, _, query_blocks, _ = pooled_query.shape
    key_blocks, device = pooled_key.shape[2], pooled_query.device
    sinks = hold_tokens(key_blocks, key_block, sink_begin, sink_end).to(device)
    forced = max(1, query_block // key_block)
    keep = min(key_blocks, max(forced, key_blocks * density_permille // 1000))
    slots = min(key_blocks, keep + int(sinks.sum()))
    if permille is not None:
        keep = min(key_blocks, max(forced, key_blocks * int(permille) // 1000))
    kept_here = min(key_blocks, keep + int(sinks.sum()))

    if key_mask is None:
        valid = torch.ones(batch, key_blocks, dtype=torch.bool, device=device)
    else:
        valid = valid_blocks(key_mask, key_block)
    first = overlap(query_blocks, key_blocks, query_block, key_block).to(device) | sinks
    scores = pooled_query @ pooled_key.transpose(-1, -2)
    scores = scores.nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
    # 2: always selected, 1: selected by score, 0: never
    group = ((1 + first.int()) * valid[:, None, None, :]).expand_as(scores)
    best = scores.argsort(dim=-1, descending=True, stable=True)
    best = best.gather(-1, group.gather(-1, best).argsort(dim=-1, descending=True, stable=True))
    kept = torch.zeros_like(group, dtype=torch.bool).scatter(-1, best[..., :kept_here], True) & (group > 0)

    ids = torch.arange(key_blocks, device=device).expand_as(kept)
    lut = ids.masked_fill(~kept, key_blocks).sort(dim=-1).values[..., :slots]
    lut = lut.masked_fill(lut == key_blocks, 0)
    dense = hold_tokens(query_blocks, query_block, sink_begin, sink_end).to(device)
    lut = torch.where(dense[:, None], ids[..., :slots], lut)
    count = kept.sum(dim=-1).masked_fill(dense, ALL_BLOCKS)
    return lut.to(torch.int32), count.to(torch.int32)
