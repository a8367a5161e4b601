"""The gradient of preparing an operand, in plain torch: compilers see its operations, and fuse them.

Nothing but the arguments is kept from the forward: what it computed is computed again, in fp32 (fp64 for fp64).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ..checks import accumulation_dtype
from ..linear.feature_maps import find_feature_map
from ..preparation import Preparation
from ..rows.reference import take_rows
from .reference import heads_first, like_rows, rotate, with_affine, without_affine


class Gradients(NamedTuple):
    """Of the loss, by the tensors that `prepare_operand` takes; each in the dtype and shape of its tensor.

    Attributes:
        tables: empty where they are not asked for. weight, bias: None where there is none.
    """

    x: Tensor
    tables: list[Tensor]
    weight: Tensor | None
    bias: Tensor | None


def gradients(
    rotated: Tensor, plain: Tensor, features: Tensor, x: Tensor, preparation: Preparation, *, of_tables: bool
) -> Gradients:
    """All gradients, from those of three results, (B, H, S, D); without features of one.

    With R the rotation, p the rows without position and f their features: g_p = g_plain + R^T g_rotated +
    phi'(p) R^T g_features, then through the norm. The means of blocks have no gradient, see `pool_blocks`.

    Args:
        rotated, plain, features: gradients of the results. of_tables: whether those of the tables are wanted.
    """
    tables, pairs, norm, over, eps, feature_map, _, weight, bias, order, inverse = preparation
    dtype = accumulation_dtype(x.dtype)
    if order is not None and inverse is not None:
        rotated = take_rows(rotated, inverse, order)
    rotated = rotated.to(dtype)
    tables = [table.to(dtype) for table in tables]
    cos, sin, *others = tables
    other_sin, other_cos = others or (sin, cos)
    back = (cos, -other_sin, -sin, other_cos)  # the transpose of a rotation
    known, scale = without_affine(x.to(dtype), norm, over, eps)
    rows = with_affine(known, weight, bias)
    grad = rotate(rotated, back, pairs)
    turned = [(heads_first(rows, x).to(x.dtype).to(dtype), rotated)]
    if feature_map:
        phi, phi_backward = find_feature_map(feature_map)
        made, position = turned[0][0], features.to(dtype)
        mapped = phi(made)
        grad = grad + plain.to(dtype) + phi_backward(rotate(position, back, pairs), mapped, made)
        turned.append((mapped, position))
    of_tensors = _of_tables(turned, preparation) if of_tables else []
    grad = like_rows(grad, norm, over)
    of_bias = None if bias is None else _per_channel(grad).to(bias.dtype)
    of_weight = None if weight is None else _per_channel(grad * known).to(weight.dtype)
    grad = grad if weight is None else grad * weight.to(dtype)
    return Gradients(heads_first(_of_norm(grad, known, scale, norm), x).to(x.dtype), of_tensors, of_weight, of_bias)


def _of_norm(grad: Tensor, known: Tensor, scale: Tensor, norm: str) -> Tensor:
    """Of the rows before the norm, from that of the rows behind it."""
    if norm == "none":
        return grad
    centred = grad - grad.mean(-1, keepdim=True) if norm == "layer" else grad
    return scale * (centred - known * (grad * known).mean(-1, keepdim=True))


def _per_channel(grad: Tensor) -> Tensor:
    return grad.sum(tuple(range(grad.dim() - 1)))


def _of_tables(turned: Sequence[tuple[Tensor, Tensor]], preparation: Preparation) -> list[Tensor]:
    """turned: what was rotated, and the gradient of what became of it."""
    tables, pairs = preparation.tables, preparation.pairs
    width = tables[0].shape[-1]
    sums: list[Tensor] | None = None
    for value, grad in turned:
        (one, two), (first, second) = (_pairs(tensor, pairs, width) for tensor in (value, grad))
        parts = [first * one, -first * two, second * one, second * two]
        sums = parts if sums is None else [a + b for a, b in zip(sums, parts, strict=True)]
    assert sums is not None
    if len(tables) == 2:
        cos, sin, other_sin, other_cos = sums
        sums = [cos + other_cos, sin + other_sin]
    return [total.sum_to_size(table.shape).to(table.dtype) for total, table in zip(sums, tables, strict=True)]


def _pairs(x: Tensor, pairs: str, width: int) -> tuple[Tensor, Tensor]:
    """The first and the second channels of the pairs that are turned, (B, H, S, P) each."""
    turning = x[..., : 2 * width]
    if pairs == "halves":
        return turning[..., :width], turning[..., width:]
    return turning[..., ::2], turning[..., 1::2]
