"""A small video diffusion transformer in the style of Wan: what the experiment trains, converts and compares.

Written like other such models: nothing here knows about SALAD.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from videos import COLOURS, PATCH, SHAPES, ClipSize


@dataclass(frozen=True)
class ModelSize:
    """Widths and depth; the head width is divided among time, rows and columns by the position encoding."""

    clip: ClipSize = field(default_factory=ClipSize)
    width: int = 192
    heads: int = 3
    layers: int = 6
    mlp_ratio: int = 3
    patch_size: tuple[int, int, int] = (1, PATCH, PATCH)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens along time, rows and columns."""
        sizes = (self.clip.frames, self.clip.edge, self.clip.edge)
        frames, rows, columns = (size // patch for size, patch in zip(sizes, self.patch_size, strict=True))
        return frames, rows, columns


def rotation_table(size: ModelSize) -> Tensor:
    """fp32 (2, 1, 1, tokens, head_dim / 2): cosines and sines of the three-dimensional rotary encoding.

    The base is 100, not 10,000: an axis of the grid has 16 tokens, over which slower rotations would hardly differ.
    """
    half = size.width // size.heads // 2
    shares = (half - 2 * (half // 3), half // 3, half // 3)
    angles = []
    positions = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in size.grid), indexing="ij")
    for position, share in zip(positions, shares, strict=True):
        rates = 100.0 ** -(torch.arange(share, dtype=torch.float64) / share)
        angles.append(position.reshape(-1, 1) * rates)
    angle = torch.cat(angles, dim=-1)[None, None]
    return torch.stack([angle.cos(), angle.sin()]).float()


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotary encoding of (B, H, S, head_dim) in fp32, back in the dtype of x."""
    first, second = x.float().chunk(2, dim=-1)
    cosine, sine = rotation[0], rotation[1]
    turned = torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1)
    return turned.to(x.dtype)


class SelfAttention(nn.Module):
    """Softmax attention over all tokens, with RMSNorm of query and key over all heads, as in Wan."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)

    def split(self, x: Tensor) -> Tensor:
        """(B, S, width) -> (B, H, S, head_dim)."""
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)

    def operands(self, x: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value as they reach attention, (B, H, S, head_dim)."""
        query = rotate(self.split(self.norm_q(self.to_q(x))), rotation)
        key = rotate(self.split(self.norm_k(self.to_k(x))), rotation)
        value = self.split(self.to_v(x))
        return query.to(value.dtype), key.to(value.dtype), value

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        """(B, S, width) -> the same."""
        query, key, value = self.operands(x, rotation)
        attended = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.to_out(attended.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the condition plus a table of the block's own."""

    def __init__(self, size: ModelSize) -> None:
        super().__init__()
        width, hidden = size.width, size.width * size.mlp_ratio
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = SelfAttention(width, size.heads)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))
        self.table = nn.Parameter(torch.randn(6, width) / math.sqrt(width))

    def forward(self, x: Tensor, condition: Tensor, rotation: Tensor) -> Tensor:
        """x: (B, S, width). condition: (B, 6, width)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.table + condition).unsqueeze(2).unbind(1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, rotation)
        out: Tensor = x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)
        return out


class VideoDiT(nn.Module):
    """Predicts the flow e - x0 of noised clips."""

    rotation: Tensor

    def __init__(self, size: ModelSize) -> None:
        super().__init__()
        self.size, width = size, size.width
        self.patch_embedding = nn.Conv3d(COLOURS, width, size.patch_size, stride=size.patch_size)
        self.label_embedding = nn.Embedding(len(SHAPES), width)
        self.time_embedding = nn.Sequential(nn.Linear(128, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm_out = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.table_out = nn.Parameter(torch.randn(2, width) / math.sqrt(width))
        self.proj_out = nn.Linear(width, COLOURS * math.prod(size.patch_size))
        self.register_buffer("rotation", rotation_table(size), persistent=False)
        nn.init.zeros_(self.proj_out.weight)

    def forward(self, hidden_states: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        """hidden_states: (B, 3, T, S, S). timestep: fp32 (B,) in [0, 1], 1 is noise. label: int64 (B,)."""
        frames, rows, columns = self.size.grid
        x = self.patch_embedding(hidden_states).flatten(2).transpose(1, 2)
        time = self.time_embedding(_sinusoids(timestep)) + self.label_embedding(label)
        condition = self.modulation(time).unflatten(-1, (6, -1))
        for block in self.blocks:
            x = block(x, condition, self.rotation)
        shift, scale = (self.table_out + time.unsqueeze(1)).unsqueeze(2).unbind(1)
        x = self.proj_out(self.norm_out(x) * (1 + scale) + shift)
        depth, height, width = self.size.patch_size
        x = x.view(-1, frames, rows, columns, COLOURS, depth, height, width)
        out: Tensor = x.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(hidden_states.shape)
        return out


def _sinusoids(timestep: Tensor) -> Tensor:
    """fp32 (B,) -> (B, 128)."""
    rates = torch.exp(torch.arange(64, device=timestep.device) * (-math.log(10_000) / 64))
    angle = 1000 * timestep.float()[:, None] * rates
    return torch.cat([angle.cos(), angle.sin()], dim=-1)
