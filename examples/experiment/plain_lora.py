"""Low-rank updates and linear attention written plainly, for the arms that are not SALAD.

The updates start and scale like those of `salad_compile.convert`: `down` Kaiming uniform, `up` zero, scale 1.
"""

from __future__ import annotations

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from model import SelfAttention, VideoDiT
from torch import Tensor

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out")
FEATURE_MAP, EPS = "relu", 1e-6  # as in salad_compile/definition/linear_branch.py


class LowRankLinear(nn.Module):
    """A frozen Linear plus a trainable update of its output."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.empty(rank, base.in_features, device=base.weight.device))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        out: Tensor = self.base(x)
        return out + F.linear(F.linear(x, self.down), self.up)


def add_low_rank(model: VideoDiT, rank: int) -> VideoDiT:
    """Freeze the model, and give the projections of its self-attention trainable updates."""
    model.requires_grad_(False)
    for block in model.blocks:
        for name in PROJECTIONS:
            setattr(block.attn, name, LowRankLinear(getattr(block.attn, name), rank))
    return model


class LinearAttention(nn.Module):
    """Linear attention instead of softmax attention, on the projections of a :class:`SelfAttention`.

    Like SALAD's linear branch it has a projection, so that both have equally many parameters. It starts as the
    identity, because there is no sparse branch beside it.
    """

    def __init__(self, attn: SelfAttention) -> None:
        super().__init__()
        self.attn = attn
        width, device = attn.norm_q.weight.shape[0], attn.norm_q.weight.device
        self.proj = nn.Linear(width, width, device=device)
        with torch.no_grad():
            self.proj.weight.copy_(torch.eye(width))
            self.proj.bias.zero_()

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        """(B, S, width) -> the same."""
        query, key, value = self.attn.operands(x, rotation)
        state = torch.ops.salad.linear_state(key, value, FEATURE_MAP)
        attended = torch.ops.salad.linear_output(query, state[0], state[1], FEATURE_MAP, EPS)
        out: Tensor = self.attn.to_out(self.proj(attended.transpose(1, 2).flatten(2)))
        return out


def make_linear(model: VideoDiT, rank: int) -> VideoDiT:
    """Low-rank updates, and linear attention alone."""
    import salad_compile.kernels  # noqa: F401  registers torch.ops.salad

    add_low_rank(model, rank)
    for block in model.blocks:
        assert isinstance(block.attn, SelfAttention)
        block.attn = LinearAttention(block.attn)
    return model
