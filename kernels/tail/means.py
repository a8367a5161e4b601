"""`salad::tail_means`: the means that stand for what sparse attention leaves out."""

from __future__ import annotations

from typing import Any

import torch

from ..autocast import without_autocast
from ..checks import check_block, check_float_4d, check_key_mask, check_key_mask_type, require
from ..differentiation import reverse_mode_only
from ..engines import Call, choose
from ..layout import block_count
from .checks import check_video
from .runs import spread_gradient


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
    check_video(begin, end, tokens)
    check_key_mask(key_mask, batch, tokens)
    if block_means is not None:
        require(
            block_means.shape == (batch, heads, block_count(tokens, block), head_dim),
            f"block_means must be those of blocks of {block}, got {tuple(block_means.shape)}",
        )
    call = Call("tail_means", x.device, x.dtype, head_dim=head_dim, masked=key_mask is not None)
    means: torch.Tensor = choose(call).run(call, x, pool, begin, end, key_mask, block_means, block)
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


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, pool, begin, end, key_mask, *_known = inputs
    ctx.save_for_backward(key_mask)
    ctx.settings = (x.shape[2], pool, begin, end)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    (key_mask,), (tokens, pool, begin, end) = ctx.saved_tensors, ctx.settings
    return spread_gradient(grad, tokens, pool, begin, end, key_mask), *(None,) * 6


tail_means.register_autograd(_backward, setup_context=_setup)
