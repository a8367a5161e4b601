"""The fast plain-torch engine of routing. Runs on any device; tuned for the CPU."""

import functools

import torch
import torch.nn.functional as F

from ..block_choice import BlockChoice
from ..checks import accumulation_dtype, valid_or_zero
from ..layout import ALL_BLOCKS, block_count
from .density import kept_now, list_width, touched_blocks

_SHORT = 1 << 13  # elements


def pool_blocks(x: torch.Tensor, block: int, key_mask: torch.Tensor | None = None) -> torch.Tensor:
    """See `reference.pool_blocks`. Full blocks are one strided reduction, the short last block a second one.

    Of few elements torch's pooling is one call, where that takes a dozen: it divides by what lies inside.
    """
    batch, heads, tokens, head_dim = x.shape
    dtype = accumulation_dtype(x.dtype)
    if key_mask is None and x.is_cpu and x.numel() <= _SHORT:
        x = x if x.dtype == dtype else x.to(dtype)
        return F.avg_pool2d(x, (block, 1), ceil_mode=True)
    reduce = torch.mean if key_mask is None else torch.sum
    x = valid_or_zero(x, key_mask)
    full = tokens // block
    pooled = x.new_empty((batch, heads, block_count(tokens, block), head_dim), dtype=dtype)
    if full:
        rows = torch.unflatten(x.narrow(2, 0, full * block), 2, (full, block))
        reduce(rows, dim=3, dtype=dtype, out=pooled.narrow(2, 0, full))
    if full * block < tokens:
        reduce(x[:, :, full * block :], dim=2, dtype=dtype, out=pooled[:, :, full])
    return pooled if key_mask is None else pooled.div_(_rows(key_mask, block).clamp_(min=1)[:, None, :, None])


def select_blocks(
    pooled_query: torch.Tensor, pooled_key: torch.Tensor, choice: BlockChoice
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.select_blocks`."""
    return keep_best(pooled_query @ pooled_key.mT, choice)


def keep_best(scores: torch.Tensor, choice: BlockChoice) -> tuple[torch.Tensor, torch.Tensor]:
    """The blocks with the best `scores` (B, H, Mq, Mk), which are written into, as of `reference.select_blocks`.

    Forced blocks score +inf, masked ones -inf, all others lie between: one top-k.
    """
    query_block, key_block, density_permille, sink_begin, sink_end, key_mask, permille = choice
    key_blocks = scores.shape[3]
    slots = _width(key_blocks, query_block, key_block, density_permille, sink_begin, sink_end)
    # An overflow must not tie with a forced block, and NaN must not outrank it: the self block is always selected.
    lowest, highest = _bounds(scores.dtype)
    scores.nan_to_num_(nan=lowest, posinf=highest, neginf=lowest)
    scores.masked_fill_(_overlap(*scores.shape[-2:], query_block, key_block, scores.device), float("inf"))
    first, end = touched_blocks(sink_begin, sink_end, key_block)
    if first < end:
        scores[..., first:end] = float("inf")
    keep = slots
    if permille is not None:
        keep = kept_now(int(permille), slots, key_blocks, query_block, key_block, end - first)
    if key_mask is None and keep == slots:
        lut = scores.topk(slots, dim=-1, sorted=False).indices.sort(dim=-1).values.to(torch.int32)
        count = torch.full(lut.shape[:3], slots, dtype=torch.int32, device=lut.device)
    else:
        lut, count = _among_valid(scores, slots, keep, key_mask, key_block)
    if sink_begin < sink_end:
        text = slice(*touched_blocks(sink_begin, sink_end, query_block))
        lut[:, :, text] = torch.arange(slots, dtype=torch.int32, device=lut.device)
        count[:, :, text] = ALL_BLOCKS
    return lut, count


_width = functools.lru_cache(maxsize=64)(list_width)  # in symbolic minima and maxima, which take long of numbers too


@functools.cache
def _bounds(dtype: torch.dtype) -> tuple[float, float]:
    return torch.finfo(dtype).min, torch.finfo(dtype).max


def _rows(key_mask: torch.Tensor, block: int) -> torch.Tensor:
    """int64 (B, M): how many valid rows each block has."""
    tokens = key_mask.shape[1]
    blocks = block_count(tokens, block)
    padded = torch.nn.functional.pad(key_mask, (0, blocks * block - tokens))
    return padded.view(-1, blocks, block).sum(dim=2)


def _among_valid(
    scores: torch.Tensor,
    slots: int,
    keep: int,
    key_mask: torch.Tensor | None,
    key_block: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `keep` best of the blocks with a valid key; rows with fewer of them end in zeros. Changes `scores`."""
    key_blocks = scores.shape[-1]
    valid = torch.ones((), dtype=torch.bool, device=scores.device)
    if key_mask is not None:
        valid = (_rows(key_mask, key_block) > 0)[:, None, None, :]
    valid = valid.expand_as(scores)
    chosen = scores.masked_fill_(~valid, float("-inf")).topk(slots, dim=-1).indices
    found = valid.gather(-1, chosen)
    found[..., keep:] = False
    lut = chosen.masked_fill_(~found, key_blocks).sort(dim=-1).values
    return lut.masked_fill_(lut == key_blocks, 0).to(torch.int32), found.sum(dim=-1).to(torch.int32)


@functools.lru_cache(maxsize=8)  # every layer asks for the same
def _overlap(
    query_blocks: int, key_blocks: int, query_block: int, key_block: int, device: torch.device
) -> torch.Tensor:
    """bool (Mq, Mk), True where a key block overlaps the query block."""
    query_start = torch.arange(query_blocks, device=device)[:, None] * query_block
    key_start = torch.arange(key_blocks, device=device)[None, :] * key_block
    return (key_start < query_start + query_block) & (query_start < key_start + key_block)
