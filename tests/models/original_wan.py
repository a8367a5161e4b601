"""Wan under the names of its first release, in two ways of writing attention: that of the release, and ComfyUI's.

Written for these tests from the formulas; it holds the same weights as diffusers' class, under
`salad_compile.exchange.to_original_names`, and computes the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DIM, HEADS, HEAD_DIM = 24, 2, 12
PATCH = (1, 2, 2)
CONFIG = {"channels": 4, "text_dim": 16, "freq_dim": 32, "ffn_dim": 48, "layers": 2}


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(DIM))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (DIM,), self.weight, 1e-6)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(DIM, DIM) for _ in range(4))
        self.norm_q, self.norm_k = Norm(), Norm()


class ReleaseAttention(Attention):
    """Heads third, and pairs of channels as complex numbers, turned in fp64."""

    def forward(self, x: Tensor, context: Tensor, angles: Tensor | None) -> Tensor:
        query, key, value = (t.unflatten(2, (HEADS, HEAD_DIM)) for t in self.project(x, context))
        if angles is not None:
            query, key = turn(query, angles), turn(key, angles)
        out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (query, key, value)))
        return self.o(out.transpose(1, 2).flatten(2))

    def project(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.norm_q(self.q(x)), self.norm_k(self.k(context)), self.v(context)


def turn(x: Tensor, angles: Tensor) -> Tensor:
    turned = torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(turned).flatten(-2).type_as(x)


class NodeAttention(Attention):
    """Heads still folded when a function of the program's is called, and rotation by 2 x 2 matrices."""

    def forward(self, x: Tensor, context: Tensor, angles: Tensor | None) -> Tensor:
        batch = x.shape[0]
        query = self.norm_q(self.q(x)).view(batch, -1, HEADS, HEAD_DIM)
        key = self.norm_k(self.k(context)).view(batch, -1, HEADS, HEAD_DIM)
        value = self.v(context)
        if angles is not None:
            query, key = (rotate_by_matrices(t, angles) for t in (query, key))
        return self.o(choose_attention(query.view(batch, -1, DIM), key.view(batch, -1, DIM), value, heads=HEADS))


def rotate_by_matrices(x: Tensor, angles: Tensor) -> Tensor:
    cos, sin = angles.cos(), angles.sin()
    matrices = torch.stack([cos, -sin, sin, cos], dim=-1).unflatten(-1, (2, 2)).float()
    pairs = x.float().unflatten(-1, (-1, 1, 2))
    return (matrices[..., 0] * pairs[..., 0] + matrices[..., 1] * pairs[..., 1]).flatten(-2).type_as(x)


def choose_attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """(B, S, heads x head_dim) throughout."""
    parts = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key, value))
    return F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)


class Block(nn.Module):
    def __init__(self, attention: type[Attention]) -> None:
        super().__init__()
        self.self_attn, self.cross_attn = attention(), attention()
        self.norm1, self.norm2 = (nn.LayerNorm(DIM, elementwise_affine=False, eps=1e-6) for _ in range(2))
        self.norm3 = nn.LayerNorm(DIM, eps=1e-6)
        self.ffn = nn.Sequential(nn.Linear(DIM, CONFIG["ffn_dim"]), nn.GELU("tanh"), nn.Linear(CONFIG["ffn_dim"], DIM))
        self.modulation = nn.Parameter(torch.randn(1, 6, DIM))

    def forward(self, x: Tensor, time: Tensor, context: Tensor, angles: Tensor) -> Tensor:
        shift, scale, gate, shift_2, scale_2, gate_2 = (self.modulation + time).chunk(6, dim=1)
        given = self.norm1(x) * (1 + scale) + shift
        x = x + gate * self.self_attn(given, given, angles)
        x = x + self.cross_attn(self.norm3(x), context, None)
        return x + gate_2 * self.ffn(self.norm2(x) * (1 + scale_2) + shift_2)


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM, elementwise_affine=False, eps=1e-6)
        self.head = nn.Linear(DIM, math.prod(PATCH) * CONFIG["channels"])
        self.modulation = nn.Parameter(torch.randn(1, 2, DIM))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale = (self.modulation + time.unsqueeze(1)).chunk(2, dim=1)
        return self.head(self.norm(x) * (1 + scale) + shift)


class WanModel(nn.Module):
    """As in the release: lists of videos, of texts."""

    attention: type[Attention] = ReleaseAttention

    def __init__(self) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv3d(CONFIG["channels"], DIM, PATCH, stride=PATCH)
        self.text_embedding = mlp(CONFIG["text_dim"], nn.GELU("tanh"))
        self.time_embedding = mlp(CONFIG["freq_dim"], nn.SiLU())
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(DIM, 6 * DIM))
        self.blocks = nn.ModuleList(Block(self.attention) for _ in range(CONFIG["layers"]))
        self.head = Head()

    def forward(self, x: list[Tensor], t: Tensor, context: list[Tensor], seq_len: int) -> list[Tensor]:
        return list(self.run(torch.stack(x), t, torch.stack(context)))

    def run(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        patches = self.patch_embedding(x)
        grid = patches.shape[2:]
        time = self.time_embedding(waves(t))
        tokens, text = patches.flatten(2).transpose(1, 2), self.text_embedding(context)
        modulation = self.time_projection(time).unflatten(1, (6, DIM))
        angles = angles_of(grid)[None, :, None]
        for block in self.blocks:
            tokens = block(tokens, modulation, text, angles)
        out = self.head(tokens, time).unflatten(1, grid).unflatten(-1, (*PATCH, CONFIG["channels"]))
        return torch.einsum("bfhwpqrc->bcfphqwr", out).reshape(x.shape)


class NodeWanModel(WanModel):
    """As in ComfyUI: one tensor of videos, and a dictionary of options."""

    attention = NodeAttention

    def forward(  # type: ignore[override]
        self, x: Tensor, timestep: Tensor, context: Tensor, transformer_options: dict[str, Any] | None = None
    ) -> Tensor:
        return self.run(x, timestep, context)


def mlp(width: int, activation: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, DIM), activation, nn.Linear(DIM, DIM))


def waves(t: Tensor) -> Tensor:
    half = CONFIG["freq_dim"] // 2
    angles = t.double()[:, None] * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    return torch.cat([angles.cos(), angles.sin()], dim=1).float()


def angles_of(grid: Sequence[int]) -> Tensor:
    """fp64 (T x H x W, head_dim / 2)."""
    pairs = HEAD_DIM // 2
    widths = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
    parts = []
    for axis, (size, width) in enumerate(zip(grid, widths, strict=True)):
        steps = 10000.0 ** (-torch.arange(width, dtype=torch.float64) / width)
        shape = [1, 1, 1, width]
        shape[axis] = size
        parts.append((torch.arange(size)[:, None] * steps).view(shape).expand(*grid, width))
    return torch.cat(parts, dim=-1).flatten(0, 2)
