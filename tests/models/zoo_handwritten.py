"""Hand-written video DiTs, one for each way of calling attention (see attention_styles.py)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.models import attention_styles as styles
from tests.models.zoo import TEXT, Case, Draw, Grid, linears, make_case, numbered


def _inputs(batch: int) -> Callable[[Draw, Grid], dict[str, Any]]:
    def inputs(draw: Draw, grid: Grid) -> dict[str, Any]:
        return {
            "x": draw(batch, 4, grid[0], 2 * grid[1], 2 * grid[2]),
            "t": torch.linspace(0.4, 0.7, batch),
            "text": draw(batch, TEXT, 20),
        }

    return inputs


def _case(
    name: str,
    style: Callable[[int, int], nn.Module],
    note: str,
    *,
    batch: int = 1,
    owner: str = "attn",
    leaves: tuple[str, str, str, str] = ("q", "k", "v", "o"),
) -> Case:
    def make() -> nn.Module:
        return styles.StyledDiT(style)

    return make_case(
        f"handwritten_{name}",
        make,
        _inputs(batch),
        sites=numbered(f"blocks.{{}}.{owner}"),
        blocks=numbered("blocks.{}"),
        projections=linears(f"blocks.0.{owner}", *leaves),
        output=lambda output: output,
        note=note,
    )


MULTIHEAD = ("in_projection", "in_projection", "in_projection", "out_proj")

HANDWRITTEN_CASES: dict[str, Case] = {
    case.name: case
    for case in [
        _case("varlen", styles.Varlen, "packed custom op with cu_seqlens, through an adapter; batch of 2", batch=2),
        _case("flash", styles.Flash, "custom op on (B, S, H, D) that answers (out, lse), through an adapter"),
        _case("flex", styles.Flex, "flex_attention without a mask"),
        _case("manual", styles.Manual, "softmax(q @ k^T / sqrt(d)) @ v in fp32"),
        _case("einsum", styles.Einsum, "einsum, softmax, einsum on (B, S, H, D)"),
        _case("multihead", styles.Multihead, "nn.MultiheadAttention", owner="attn.inner", leaves=MULTIHEAD, batch=2),
        _case(
            "multihead_seq_first",
            functools.partial(styles.Multihead, batch_first=False),
            "nn.MultiheadAttention on (S, B, C)",
            owner="attn.inner",
            leaves=MULTIHEAD,
            batch=2,
        ),
        _case("unbatched", styles.Unbatched, "tokens (S, C), heads (H, S, D)"),
        _case("grouped", styles.Grouped, "fused qkv with fewer key heads", leaves=("qkv", "qkv", "qkv", "o")),
        _case("scaled", styles.Scaled, "a scale of its own"),
        _case("dropout", styles.Dropped, "attention dropout in training"),
    ]
}
