"""`salad::take_rows`: a permutation of tokens whose backward is a gather too.

Attention over blocks of another order than the model's needs contiguous blocks. Gathering inside the attention kernel
slows it down (docs/kernels.md); a gather before it is nearly free if a pointwise operation writes the rows anyway.
As plain ATen the backward would scatter with atomics: autograd does not know that an index is a permutation. So this is
an operator with a formula, and Inductor gets :func:`decompositions`, which turn it into ATen that it fuses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import FunctionCtx

from ..checks import check_move, check_order_type, require
from ..differentiation import reverse_mode_only
from ..direct import direct
from .reference import take_rows as _take_rows


@torch.library.custom_op("salad::take_rows", mutates_args=())
@direct("salad::take_rows")
@reverse_mode_only
def take_rows(x: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Row order[i] of every head as row i.

    Args:
        x: (B, H, S, D), any strides and dtype.
        order: int32 (S,), a permutation. inverse: int32 (S,), its inverse: inverse[order[i]] = i; for the backward.

    Returns:
        (B, H, S, D), laid out as a contiguous (B, S, H, D) seen transposed.

    Raises:
        KernelArgumentError: on a wrong rank, dtype, device or length; on the CPU also if order is not a permutation, or
            inverse not its inverse.
    """
    if len(x.shape) != 4:  # a message takes as long to write as a small operation
        require(False, f"x must have 4 dimensions (B, H, S, D), got {len(x.shape)}")
    check_move(x, order, inverse)
    return _take_rows(x, order, inverse)


@take_rows.register_fake
def _(x: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    check_order_type(order)
    check_order_type(inverse)
    batch, heads, tokens, head_dim = x.shape
    return x.new_empty((batch, tokens, heads, head_dim)).transpose(1, 2)


def _setup(ctx: FunctionCtx, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    _, order, inverse = inputs
    ctx.save_for_backward(order, inverse)


def _backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    order, inverse = ctx.saved_tensors  # type: ignore[attr-defined]
    return take_rows(grad, inverse, order), None, None


take_rows.register_autograd(_backward, setup_context=_setup)


def decompositions() -> dict[Any, Callable[..., torch.Tensor]]:
    """Operator -> the same in ATen, for compilers that fuse."""
    return {torch.ops.salad.take_rows.default: _take_rows}
