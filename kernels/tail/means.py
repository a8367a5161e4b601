"""`salad::tail_means`: the means that stand for what sparse attention leaves out."""

from __future__ import annotations

from typing import Any

import torch

from ..autocast import without_autocast
from ..checks import (
    BLOCK_SIZES,
    accumulation_dtype,
    check_block,
    check_float_4d,
    check_key_mask,
    check_key_mask_type,
    require,
)
from ..differentiation import reverse_mode_only
from ..engines import Call, choose
from ..layout import block_count


@torch.library.custom_op("salad::tail_means", mutates_args=())
@reverse_mode_only
@without_autocast
def tail_means(
    x: torch.Tensor,
    pool: int,
    begin: int,
    end: int,
    key_mask: torch.Tensor | None = None,
    block_means: torch.Tensor | None = None,
    block: int = 0,
) -> torch.Tensor:
    """Means over pools of tokens, of the valid ones of the video (specification 4.6; our choice). Differentiable.

    Args:
        x: (B, H, S, D), key or value, any strides.
        pool: tokens per pool: consecutive runs, of which the last may be short.
        begin, end: only tokens [begin, end) count: those of the video.
        key_mask: bool (B, S), True where a token is valid; None where all are.
        block_means: (B, H, ceil(S / block), D) of `pool_blocks`, if they are known, of the same tokens: then x is not
            read. block: their tokens, which divide `pool`.

    Returns:
        (B, H, ceil(S / pool), D) in the dtype of x, summed in fp32 (fp64 for fp64); 0 for a pool without any token.

    Raises:
        KernelArgumentError: the pool is not positive, the range lies outside the tokens, or the mask does not fit.
    """
    batch, heads, tokens, head_dim = x.shape
    _check(x, pool, key_mask, block_means, block)
    require(0 <= begin <= end <= tokens, f"the video [{begin}, {end}) must lie within {tokens} tokens")
    check_key_mask(key_mask, batch, tokens)
    valid = None if key_mask is None and end - begin == tokens else _valid_rows(x, begin, end, key_mask)
    unit = block if block_means is not None else max((size for size in BLOCK_SIZES if pool % size == 0), default=0)
    if not unit:
        return _plain_means(x, pool, valid)
    if block_means is not None:
        require(
            block_means.shape == (batch, heads, block_count(tokens, block), head_dim),
            f"block_means must be those of blocks of {block}, got {tuple(block_means.shape)}",
        )
        means = block_means
    else:
        call = Call("pool_blocks", x.device, x.dtype, head_dim=head_dim, key_block=unit, masked=valid is not None)
        means = choose(call).run(call, x, unit, None if valid is None else valid.expand(batch, tokens))
    if unit < pool:
        counts = _counts(valid, x, unit)[:, None, :, None]
        means = _runs(means * counts, pool // unit) / _runs(counts, pool // unit).clamp(min=1)
    means = means.to(x.dtype)
    return means.clone() if means is block_means else means  # no result of an operator may be one of its arguments


@tail_means.register_fake
def _(
    x: torch.Tensor,
    pool: int,
    begin: int,
    end: int,
    key_mask: torch.Tensor | None = None,
    block_means: torch.Tensor | None = None,
    block: int = 0,
) -> torch.Tensor:
    _check(x, pool, key_mask, block_means, block)
    batch, heads, tokens, head_dim = x.shape
    return x.new_empty((batch, heads, block_count(tokens, pool), head_dim))


def _check(
    x: torch.Tensor, pool: int, key_mask: torch.Tensor | None, block_means: torch.Tensor | None, block: int
) -> None:
    check_float_4d(x=x)
    check_key_mask_type(key_mask)
    require(pool > 0, f"pool must be positive, got {pool}")
    if block_means is not None:
        check_block("block", block)
        require(pool % block == 0, f"block={block}, of which the means are known, must divide pool={pool}")


def _valid_rows(x: torch.Tensor, begin: int, end: int, key_mask: torch.Tensor | None) -> torch.Tensor:
    """bool (1 or B, S), True for the tokens that pools are made of."""
    position = torch.arange(x.shape[2], device=x.device)
    inside = ((position >= begin) & (position < end))[None]
    return inside if key_mask is None else inside & key_mask


def _counts(valid: torch.Tensor | None, x: torch.Tensor, size: int) -> torch.Tensor:
    """(1 or B, ceil(S / size)), how many tokens each run has that count, in the dtype of sums."""
    if valid is None:
        valid = torch.ones((1, x.shape[2]), dtype=torch.bool, device=x.device)
    return _runs(valid[:, None, :, None].to(accumulation_dtype(x.dtype)), size)[:, 0, :, 0]


def _runs(x: torch.Tensor, size: int) -> torch.Tensor:
    """(B, H, N, D) -> (B, H, ceil(N / size), D), sums over runs of the third axis."""
    padded = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % size))
    return torch.unflatten(padded, 2, (-1, size)).sum(3)


def _plain_means(x: torch.Tensor, pool: int, valid: torch.Tensor | None) -> torch.Tensor:
    wide = x.to(accumulation_dtype(x.dtype))
    kept = wide if valid is None else wide.masked_fill(valid.logical_not()[:, None, :, None], 0)
    means: torch.Tensor = _runs(kept, pool) / _counts(valid, x, pool).clamp(min=1)[:, None, :, None]
    return means.to(x.dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, pool, begin, end, key_mask, *_known = inputs
    ctx.save_for_backward(key_mask)
    ctx.settings = (x.shape[2], pool, begin, end)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Plain operations of torch, which a compiler fuses with the sum that they join."""
    (key_mask,), (tokens, pool, begin, end) = ctx.saved_tensors, ctx.settings
    rows = grad[:, :, :, None].expand(*grad.shape[:3], pool, grad.shape[3]).flatten(2, 3)[:, :, :tokens]
    valid = None if key_mask is None and end - begin == tokens else _valid_rows(rows, begin, end, key_mask)
    counts = _counts(valid, rows, pool).clamp(min=1)
    spread = counts[:, :, None].expand(*counts.shape, pool).flatten(1, 2)[:, :tokens]
    of_rows = rows / spread[:, None, :, None]
    if valid is not None:
        of_rows = of_rows.masked_fill(valid.logical_not()[:, None, :, None], 0)
    return of_rows.to(grad.dtype), *(None,) * 6


tail_means.register_autograd(_backward, setup_context=_setup)
