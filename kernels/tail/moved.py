"""`salad::take_rows_with_means`: a move of rows into the token order that leaves the means of pools behind."""

from __future__ import annotations

from typing import Any

import torch

from ..autocast import without_autocast
from ..checks import check_float_4d, check_move, check_order_type, require
from ..differentiation import reverse_mode_only
from ..engines import Call, choose
from ..layout import block_count, empty_bshd
from ..rows.reference import take_rows
from .checks import check_video
from .runs import spread_gradient


@torch.library.custom_op("salad::take_rows_with_means", mutates_args=())
@reverse_mode_only
@without_autocast
def take_rows_with_means(
    x: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor, pool: int, begin: int, end: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`take_rows` and `tail_means` of what it gives, in one pass over x. Differentiable, in plain torch.

    Args:
        x: (B, H, S, D), any strides; fp32, bf16, fp16 or fp64.
        order, inverse: int32 (S,), a permutation and its inverse, see `take_rows`.
        pool, begin, end: see `tail_means`; the range is of moved rows.

    Returns:
        rows: (B, H, S, D), row order[i] as row i, laid out as a contiguous (B, S, H, D) seen transposed.
        means: (B, H, ceil(S / pool), D) in the dtype of x.

    Raises:
        KernelArgumentError: on a wrong rank, dtype, device, length or range; on the CPU also on an order that is none.
        UnsupportedKernelError: the engine has no kernel for this dtype, head_dim or GPU.
    """
    _check(x, order, inverse, pool)
    check_move(x, order, inverse)
    check_video(begin, end, x.shape[2])
    call = Call("take_rows_with_means", x.device, x.dtype, head_dim=x.shape[-1])
    rows, means = choose(call).run(call, x, order, inverse, pool, begin, end)
    return rows, means


def _check(x: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor, pool: int) -> None:
    """What a fake can be asked."""
    check_float_4d(x=x)
    check_order_type(order)
    check_order_type(inverse)
    require(pool > 0, f"pool must be positive, got {pool}")


@take_rows_with_means.register_fake
def _(
    x: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor, pool: int, begin: int, end: int
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(x, order, inverse, pool)
    batch, heads, tokens, head_dim = x.shape
    return empty_bshd(x, *x.shape), x.new_empty((batch, heads, block_count(tokens, pool), head_dim))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    _, order, inverse, *settings = inputs
    ctx.save_for_backward(order, inverse)
    ctx.settings = settings


def _backward(ctx: Any, grad: torch.Tensor, grad_means: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    order, inverse = ctx.saved_tensors
    pool, begin, end = ctx.settings
    joined = grad + spread_gradient(grad_means, grad.shape[2], pool, begin, end, None)
    return take_rows(joined, inverse, order), *(None,) * 5


take_rows_with_means.register_autograd(_backward, setup_context=_setup)
