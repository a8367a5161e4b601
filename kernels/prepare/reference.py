"""The definition of preparing an operand, in plain torch: readable, usable in fp64; also what runs without a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..checks import accumulation_dtype
from ..layout import empty_bshd
from ..linear.absent import absent
from ..linear.feature_maps import find_feature_map
from ..preparation import Preparation
from ..routing.reference import pool_blocks
from ..rows.reference import take_rows


def prepare_operand(
    x: torch.Tensor, preparation: Preparation
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See :func:`salad_compile.kernels.prepare.api.prepare_operand`. Rounds where that says, and nowhere else."""
    tables, pairs, norm, over, eps, feature_map, block, weight, bias, order, inverse = preparation
    plain = _in_rows(normalised(x, norm, over, eps, weight, bias).to(x.dtype))
    rotated = rotate(plain, tables, pairs)
    rotated = _in_rows(rotated) if order is None or inverse is None else take_rows(rotated, order, inverse)
    means = pool_blocks(rotated, block) if block else x.new_empty((0,), dtype=accumulation_dtype(x.dtype))
    if not feature_map:
        return rotated, absent(x), absent(x), means
    phi, _ = find_feature_map(feature_map)
    wide = plain.to(accumulation_dtype(x.dtype))
    return rotated, plain, _in_rows(rotate(phi(wide).to(x.dtype), tables, pairs)), means


def normalised(
    x: torch.Tensor, norm: str, over: str, eps: float, weight: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    """(B, H, S, D) after "rms" or "layer" norm over the channels of one head or of all; "none": as it is.

    In fp32 (fp64 for fp64) from the values of x to the result.
    """
    rows, _ = without_affine(x.to(accumulation_dtype(x.dtype)), norm, over, eps)
    return heads_first(with_affine(rows, weight, bias), x)


def without_affine(x: torch.Tensor, norm: str, over: str, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of `like_rows` divided by their size, and one over that; "none": as they are."""
    rows = like_rows(x, norm, over)
    if norm == "none":
        return rows, rows.new_ones(())
    if norm == "layer":
        rows = rows - rows.mean(-1, keepdim=True)
    scale = torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps)
    return rows * scale, scale


def with_affine(rows: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
    """Weight and bias of a norm, in the dtype of the rows."""
    rows = rows if weight is None else rows * weight.to(rows.dtype)
    return rows if bias is None else rows + bias.to(rows.dtype)


def like_rows(x: torch.Tensor, norm: str, over: str) -> torch.Tensor:
    """(B, H, S, D) -> (B, S, H, D), or (B, S, H * D) where a norm is over all heads."""
    rows = x.transpose(1, 2)
    return rows.flatten(2) if norm != "none" and over == "width" else rows


def heads_first(rows: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The opposite of `like_rows`, with the heads of x."""
    heads = torch.unflatten(rows, 2, (x.shape[1], x.shape[3])) if rows.dim() == 3 else rows
    return heads.transpose(1, 2)


def rotate(x: torch.Tensor, tables: Sequence[torch.Tensor], pairs: str) -> torch.Tensor:
    """(B, H, S, D), its first channels turned in pairs by tables that broadcast to (B, H, S, P); in the dtype of x.

    Of P pairs, pair i is channels 2 i and 2 i + 1 ("interleaved"), or i and i + P ("halves"). The rest stays.
    """
    dtype = accumulation_dtype(x.dtype)
    cos, sin, *others = (table.to(dtype) for table in tables)
    other_sin, other_cos = others or (sin, cos)
    turning, rest = x[..., : 2 * cos.shape[-1]], x[..., 2 * cos.shape[-1] :]
    split = turning.reshape(*turning.shape[:-1], *((-1, 2) if pairs == "interleaved" else (2, cos.shape[-1]))).to(dtype)
    axis = -1 if pairs == "interleaved" else -2
    one, two = split.unbind(axis)
    turned = torch.stack([one * cos - two * sin, one * other_sin + two * other_cos], dim=axis)
    return torch.cat([turned.flatten(-2).to(x.dtype), rest], dim=-1)


def _in_rows(x: torch.Tensor) -> torch.Tensor:
    """(B, H, S, D) with the tokens before the heads in memory."""
    return empty_bshd(x, *x.shape).copy_(x)
