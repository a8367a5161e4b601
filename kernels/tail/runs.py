"""Means over runs of tokens, and their gradient, in plain torch: on any device, and for compilers to fuse."""

from __future__ import annotations

import torch

from ..checks import BLOCK_SIZES, accumulation_dtype
from ..routing.torch import pool_blocks
from ..rows.reference import take_rows


def tail_means(
    x: torch.Tensor,
    pool: int,
    begin: int,
    end: int,
    key_mask: torch.Tensor | None,
    block_means: torch.Tensor | None,
    block: int,
) -> torch.Tensor:
    """See `reference.tail_means`. Of means of blocks, which are known or made first, where blocks fill a pool."""
    batch, _, tokens, _ = x.shape
    valid = None if key_mask is None and end - begin == tokens else valid_rows(x, begin, end, key_mask)
    unit = block if block_means is not None else max((size for size in BLOCK_SIZES if pool % size == 0), default=0)
    if not unit:
        return plain_means(x, pool, valid)
    means = block_means
    if means is None:
        means = pool_blocks(x, unit, None if valid is None else valid.expand(batch, tokens))
    if unit < pool:
        counts = _counts(valid, x, unit)[:, None, :, None]
        means = _runs(means * counts, pool // unit) / _runs(counts, pool // unit).clamp(min=1)
    return means.to(x.dtype)


def take_rows_with_means(
    x: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor, pool: int, begin: int, end: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.take_rows_with_means`."""
    rows = take_rows(x, order, inverse)
    return rows, tail_means(rows, pool, begin, end, None, None, 0)


def plain_means(x: torch.Tensor, pool: int, valid: torch.Tensor | None) -> torch.Tensor:
    """(B, H, ceil(S / pool), D), means of the valid rows of each run."""
    wide = x.to(accumulation_dtype(x.dtype))
    kept = wide if valid is None else wide.masked_fill(valid.logical_not()[:, None, :, None], 0)
    means: torch.Tensor = _runs(kept, pool) / _counts(valid, x, pool).clamp(min=1)[:, None, :, None]
    return means.to(x.dtype)


def valid_rows(x: torch.Tensor, begin: int, end: int, key_mask: torch.Tensor | None) -> torch.Tensor:
    """bool (1 or B, S), True for the tokens that pools are made of."""
    position = torch.arange(x.shape[2], device=x.device)
    inside = ((position >= begin) & (position < end))[None]
    return inside if key_mask is None else inside & key_mask


def spread_gradient(
    grad: torch.Tensor, tokens: int, pool: int, begin: int, end: int, key_mask: torch.Tensor | None
) -> torch.Tensor:
    """The gradient of rows (B, H, S, D) from that of the means of pools, (B, H, P, D).

    Plain operations of torch, which a compiler fuses with the sum that they join.
    """
    rows = grad[:, :, :, None].expand(*grad.shape[:3], pool, grad.shape[3]).flatten(2, 3)[:, :, :tokens]
    valid = None if key_mask is None and end - begin == tokens else valid_rows(rows, begin, end, key_mask)
    counts = _counts(valid, rows, pool).clamp(min=1)
    spread = counts[:, :, None].expand(*counts.shape, pool).flatten(1, 2)[:, :tokens]
    of_rows = rows / spread[:, None, :, None]
    if valid is not None:
        of_rows = of_rows.masked_fill(valid.logical_not()[:, None, :, None], 0)
    return of_rows.to(grad.dtype)


def _counts(valid: torch.Tensor | None, x: torch.Tensor, size: int) -> torch.Tensor:
    """(1 or B, ceil(S / size)), how many tokens each run has that count, in the dtype of sums."""
    if valid is None:
        valid = torch.ones((1, x.shape[2]), dtype=torch.bool, device=x.device)
    return _runs(valid[:, None, :, None].to(accumulation_dtype(x.dtype)), size)[:, 0, :, 0]


def _runs(x: torch.Tensor, size: int) -> torch.Tensor:
    """(B, H, N, D) -> (B, H, ceil(N / size), D), sums over runs of the third axis."""
    padded = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % size))
    return torch.unflatten(padded, 2, (-1, size)).sum(3)
