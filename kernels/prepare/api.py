"""`salad::prepare_operand`: everything between a projection and attention over blocks, in one pass over its rows."""

from collections.abc import Sequence
from typing import Any

import torch

from ..autocast import without_autocast
from ..checks import accumulation_dtype, check_move
from ..differentiation import reverse_mode_only
from ..engines import Call, engines, serve
from ..layout import block_count, empty_bshd
from ..linear.absent import absent
from ..preparation import Preparation
from .checks import check_sizes, check_types
from .gradient import gradients

_SETTINGS = len(Preparation._fields) - 1  # what follows the tables, of which there are two or four


@torch.library.custom_op("salad::prepare_operand", mutates_args=())
@reverse_mode_only
@without_autocast
def prepare_operand(
    x: torch.Tensor,
    tables: Sequence[torch.Tensor],
    pairs: str,
    norm: str,
    over: str,
    eps: float,
    feature_map: str,
    block: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    order: torch.Tensor | None = None,
    inverse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A projected query or key with norm, rotation, features of map-then-rotate, token order and block means.

    Computed in fp32 (fp64 for fp64). Rounded to the dtype of x are: the normalised rows, of which everything else is
    made; the features before their rotation; and each result. Products with the tables are not rounded one by one.

    The backward pass is plain torch (gradient.py), for x, tables, weight and bias. The means have no gradient.

    Args:
        x: (B, H, S, D), any strides; fp32, bf16, fp16 or fp64.
        tables: cos and sin of the rotation, which broadcast to (B, H, S, P), any strides, any floating dtype: of a pair
            (a, b) it makes a cos - b sin and a sin + b cos. With four tables the second line has its own sin and cos,
            in this order. Channels from 2 P on are not turned.
        pairs: "interleaved", channels 2 i and 2 i + 1, or "halves", channels i and i + P.
        norm: "none", "rms" or "layer". over: the channels of one "head", or of all ("width").
        eps: added to the mean square of a norm.
        feature_map: of the linear branch, see `linear_state`; "": no features are wanted.
        block: tokens per block of the means; 0: no means are wanted.
        weight, bias: (D,) or with "width" (H * D,), of the norm; any floating dtype.
        order: int32 (S,), a permutation: row order[i] becomes row i of `rotated`. inverse: its inverse. None: as in x.

    Returns:
        rotated: (B, H, S, D), in token order.
        plain: (B, H, S, D), the normalised rows without position, in the order of x; (0,) without features.
        features: (B, H, S, D), rotated phi(plain), in the order of x; (0,) without features.
        means: (B, H, ceil(S / block), D), fp32 (fp64 for fp64), of each block of `rotated`; (0,) without means.
        The first three lie in memory as (B, S, H, D).

    Raises:
        KernelArgumentError: on a wrong rank, shape, dtype, device, name or block.
        UnsupportedKernelError: the engine has no kernel for this dtype, head_dim, width, block or GPU.
    """
    preparation = Preparation(tuple(tables), pairs, norm, over, eps, feature_map, block, weight, bias, order, inverse)
    engine, call = serve(_describe, x, *preparation[1:], *preparation.tables)
    if order is not None and inverse is not None:
        check_move(x, order, inverse)
    rotated, plain, features, means = engine.run(call, x, preparation)
    return rotated, plain, features, means


def _describe(x: torch.Tensor, *given: Any) -> Call:
    settings, tables = given[:_SETTINGS], given[_SETTINGS:]
    preparation = Preparation(tables, *settings)
    check_types(x, preparation)
    check_sizes(x, preparation)
    return _call(x, preparation.feature_map, preparation.block)


def _call(x: torch.Tensor, feature_map: str, block: int) -> Call:
    name, head_dim = "prepare_operand", x.shape[-1]
    return Call(name, x.device, x.dtype, head_dim=head_dim, key_block=block or None, feature_map=feature_map)


def why_unsupported(x: torch.Tensor, feature_map: str) -> str:
    """Why no engine prepares operands like x (B, H, S, D), which may be fake; the empty string if one does."""
    call, reasons = _call(x, feature_map, 0), []
    for engine in engines():
        if call.operator in engine.operators:
            reason = engine.supports(call)
            if reason is None:
                return ""
            reasons.append(reason)
    return reasons[0]


@prepare_operand.register_fake
def _(x: torch.Tensor, *given: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    preparation = Preparation(*given, **named)
    check_types(x, preparation)
    feature_map, block = preparation.feature_map, preparation.block
    batch, heads, tokens, head_dim = x.shape
    rotated = empty_bshd(x, batch, heads, tokens, head_dim)
    shape = (batch, heads, block_count(tokens, block), head_dim) if block else (0,)
    means = x.new_empty(shape, dtype=accumulation_dtype(x.dtype))
    if not feature_map:
        return rotated, absent(x), absent(x), means
    return rotated, torch.empty_like(rotated), torch.empty_like(rotated), means


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, preparation = inputs[0], Preparation(*inputs[1:])
    ctx.count = len(preparation.tables)
    ctx.settings = preparation[1:7]
    ctx.save_for_backward(x, *preparation.tables, *preparation[7:])
    ctx.mark_non_differentiable(output[3])


def _backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
    x, *saved = ctx.saved_tensors
    rotated, plain, features, _ = grads
    preparation = Preparation(saved[: ctx.count], *ctx.settings, *saved[ctx.count :])
    made = gradients(rotated, plain, features, x, preparation, of_tables=any(ctx.needs_input_grad[1]))
    of_tables: list[Any] = [*made.tables] or [None] * ctx.count
    # torch leaves out last arguments that have their default, and with a list among them it wants no more back
    return (made.x, of_tables, *(None,) * 6, made.weight, made.bias, None, None)[: len(ctx.needs_input_grad)]


prepare_operand.register_autograd(_backward, setup_context=_setup)
