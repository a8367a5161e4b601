"""Wan under the names of its first release, small, for text to video.

Written from the formulas. It holds the same weights as diffusers' class, under the names that
`salad_compile.exchange.to_original_names` gives, and computes the same; with the release at hand take its own
`wan.modules.model.WanModel` instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH = (1, 2, 2)


@dataclass(frozen=True)
class Sizes:
    """Widths of a model."""

    heads: int
    head_dim: int
    channels: int
    text_dim: int
    freq_dim: int
    ffn_dim: int
    layers: int

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim

    @classmethod
    def of_diffusers(cls, config: Any) -> Sizes:
        """Those of a `WanTransformer3DModel`, from its configuration."""
        return cls(
            config.num_attention_heads,
            config.attention_head_dim,
            config.in_channels,
            config.text_dim,
            config.freq_dim,
            config.ffn_dim,
            config.num_layers,
        )


class Norm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, 1e-6)


class Attention(nn.Module):
    """Heads third, and pairs of channels as complex numbers, turned in fp64."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads = sizes.heads
        self.q, self.k, self.v, self.o = (nn.Linear(sizes.dim, sizes.dim) for _ in range(4))
        self.norm_q, self.norm_k = Norm(sizes.dim), Norm(sizes.dim)

    def forward(self, x: Tensor, context: Tensor, angles: Tensor | None) -> Tensor:
        query, key, value = (t.unflatten(2, (self.heads, -1)) for t in self.project(x, context))
        if angles is not None:
            query, key = turn(query, angles), turn(key, angles)
        out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (query, key, value)))
        return self.o(out.transpose(1, 2).flatten(2))

    def project(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.norm_q(self.q(x)), self.norm_k(self.k(context)), self.v(context)


def turn(x: Tensor, angles: Tensor) -> Tensor:
    turned = torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(turned).flatten(-2).type_as(x)


class Block(nn.Module):
    def __init__(self, sizes: Sizes, attention: type[Attention]) -> None:
        super().__init__()
        dim = sizes.dim
        self.self_attn, self.cross_attn = attention(sizes), attention(sizes)
        self.norm1, self.norm2 = (nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6) for _ in range(2))
        self.norm3 = nn.LayerNorm(dim, eps=1e-6)
        self.ffn = nn.Sequential(nn.Linear(dim, sizes.ffn_dim), nn.GELU("tanh"), nn.Linear(sizes.ffn_dim, dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim))

    def forward(self, x: Tensor, time: Tensor, context: Tensor, angles: Tensor) -> Tensor:
        shift, scale, gate, shift_2, scale_2, gate_2 = (self.modulation + time).chunk(6, dim=1)
        given = self.norm1(x) * (1 + scale) + shift
        x = x + gate * self.self_attn(given, given, angles)
        x = x + self.cross_attn(self.norm3(x), context, None)
        return x + gate_2 * self.ffn(self.norm2(x) * (1 + scale_2) + shift_2)


class Head(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(sizes.dim, elementwise_affine=False, eps=1e-6)
        self.head = nn.Linear(sizes.dim, math.prod(PATCH) * sizes.channels)
        self.modulation = nn.Parameter(torch.randn(1, 2, sizes.dim))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale = (self.modulation + time.unsqueeze(1)).chunk(2, dim=1)
        return self.head(self.norm(x) * (1 + scale) + shift)


class WanModel(nn.Module):
    """As in the release: lists of videos, of texts."""

    attention: type[Attention] = Attention

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        dim = sizes.dim
        self.sizes = sizes
        self.patch_embedding = nn.Conv3d(sizes.channels, dim, PATCH, stride=PATCH)
        self.text_embedding = mlp(sizes.text_dim, dim, nn.GELU("tanh"))
        self.time_embedding = mlp(sizes.freq_dim, dim, nn.SiLU())
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(sizes, self.attention) for _ in range(sizes.layers))
        self.head = Head(sizes)

    def forward(self, x: list[Tensor], t: Tensor, context: list[Tensor], seq_len: int) -> list[Tensor]:
        """Videos (C, T, H, W), timesteps (B,), texts (L, D) of one length -> what the model predicts of each video."""
        return list(self.run(torch.stack(x), t, torch.stack(context)))

    def run(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        patches = self.patch_embedding(x)
        grid = patches.shape[2:]
        time = self.time_embedding(waves(t, self.sizes.freq_dim))
        tokens, text = patches.flatten(2).transpose(1, 2), self.text_embedding(context)
        modulation = self.time_projection(time).unflatten(1, (6, -1))
        angles = angles_of(grid, self.sizes.head_dim)[None, :, None]
        for block in self.blocks:
            tokens = block(tokens, modulation, text, angles)
        out = self.head(tokens, time).unflatten(1, grid).unflatten(-1, (*PATCH, self.sizes.channels))
        return torch.einsum("bfhwpqrc->bcfphqwr", out).reshape(x.shape)


def mlp(width: int, dim: int, activation: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, dim), activation, nn.Linear(dim, dim))


def waves(t: Tensor, width: int) -> Tensor:
    half = width // 2
    angles = t.double()[:, None] * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    return torch.cat([angles.cos(), angles.sin()], dim=1).float()


def angles_of(grid: Sequence[int], head_dim: int) -> Tensor:
    """fp64 (T x H x W, head_dim / 2)."""
    pairs = head_dim // 2
    widths = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
    parts = []
    for axis, (size, width) in enumerate(zip(grid, widths, strict=True)):
        steps = 10000.0 ** (-torch.arange(width, dtype=torch.float64) / width)
        shape = [1, 1, 1, width]
        shape[axis] = size
        parts.append((torch.arange(size)[:, None] * steps).view(shape).expand(*grid, width))
    return torch.cat(parts, dim=-1).flatten(0, 2)
