"""Three small video DiTs in the styles that people write by hand, none of them made by a library.

Each takes ``x`` (B, C, T, H, W), ``t`` (B,) and ``text`` (B, L, text_dim) and returns a tensor shaped like ``x``. They
differ in what a graph rewriter has to cope with: `FusedDiT` has one qkv Linear and rotates halves, `RearrangeDiT` has
separate Linears, qk-norm, and rotates by complex multiplication, `InlineDiT` has no attention module at all.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH = (1, 2, 2)


def sinusoids(positions: Tensor, width: int, theta: float = 10_000.0) -> Tensor:
    """Sines then cosines of ``positions`` (N,): (N, width); ``width`` must be even."""
    frequencies = theta ** (-torch.arange(width // 2, device=positions.device, dtype=torch.float32) / (width // 2))
    angles = positions.to(torch.float32)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def grid_angles(grid: tuple[int, int, int], widths: tuple[int, int, int], device: torch.device) -> Tensor:
    """Rotation angles of all tokens of a (T, H, W) grid, each axis in its own run of channels: (T*H*W, sum(widths))."""
    parts = []
    for axis, (length, width) in enumerate(zip(grid, widths, strict=True)):
        frequencies = 100.0 ** (-torch.arange(width, device=device, dtype=torch.float32) / width)
        angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequencies
        shape = [1, 1, 1, width]
        shape[axis] = length
        parts.append(angles.view(shape).expand(*grid, width))
    return torch.cat(parts, dim=-1).flatten(0, 2)


def rearrange(x: Tensor, pattern: str, **sizes: int) -> Tensor:
    """A little of einops: ``rearrange(x, "b s (h d) -> b h s d", h=4)``. A group may leave one size out."""
    left, right = (side.replace("(", " ( ").replace(")", " ) ").split() for side in pattern.split("->"))
    atoms: list[str] = []
    split: list[int] = []
    axis, inside = 0, False
    for token in left:
        if token in "()":
            inside = token == "("
            axis += token == ")"
        else:
            atoms.append(token)
            split.append(sizes.get(token, -1) if inside else x.shape[axis])
            axis += not inside
    x = x.reshape(split).permute([atoms.index(token) for token in right if token not in "()"])
    merged: list[int] = []
    axis, product, inside = 0, 1, False
    for token in right:
        if token == "(":
            product, inside = 1, True
        elif token == ")":
            merged.append(product)
            inside = False
        else:
            product = product * x.shape[axis] if inside else product
            if not inside:
                merged.append(x.shape[axis])
            axis += 1
    return x.reshape(merged)


class Ends(nn.Module):
    """What the three models share: patches in, time and text embeddings, modulated projection out, patches back."""

    def __init__(self, channels: int, dim: int, text_dim: int) -> None:
        super().__init__()
        self.patch = nn.Conv3d(channels, dim, kernel_size=PATCH, stride=PATCH)
        self.time = nn.Sequential(nn.Linear(32, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.text = nn.Linear(text_dim, dim)
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.modulation = nn.Linear(dim, 2 * dim)
        self.head = nn.Linear(dim, channels * math.prod(PATCH))

    def tokens(self, x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        """(B, C, T, H, W) -> (B, S, dim) and the token grid (T, H/2, W/2)."""
        patches = self.patch(x)
        return patches.flatten(2).transpose(1, 2), (patches.shape[2], patches.shape[3], patches.shape[4])

    def conditions(self, t: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """(B,), (B, L, text_dim) -> (B, dim), (B, L, dim)."""
        return self.time(sinusoids(t, 32)), self.text(text)

    def video(self, tokens: Tensor, time: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """(B, S, dim) -> (B, C, T, H, W)."""
        shift, scale = self.modulation(F.silu(time))[:, None].chunk(2, dim=-1)
        patches = self.head(self.norm(tokens) * (1 + scale) + shift)
        return rearrange(
            patches, "b (t h w) (c p q) -> b c t (h p) (w q)", t=grid[0], h=grid[1], w=grid[2], p=PATCH[1], q=PATCH[2]
        )


class CrossAttention(nn.Module):
    """Video tokens read text tokens; the kind of call that must be left alone."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """(B, S, dim), (B, L, dim) -> (B, S, dim)."""
        q = rearrange(self.q(x), "b s (h d) -> b h s d", h=self.heads)
        k, v = (rearrange(part, "b s (h d) -> b h s d", h=self.heads) for part in self.kv(text).chunk(2, dim=-1))
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h s d -> b s (h d)"))


# ---------------------------------------------------------------- (a) fused qkv, adaLN, rope on halves


class FusedSelfAttention(nn.Module):
    """One qkv Linear, reshape and unbind; attention arguments by position."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        """(B, S, dim), (S, head_dim/2) -> (B, S, dim)."""
        batch, length, dim = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, self.heads, dim // self.heads).unbind(2)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]

        def rotate(y: Tensor) -> Tensor:
            first, second = y.chunk(2, dim=-1)
            return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(y.dtype)

        out = F.scaled_dot_product_attention(rotate(q).transpose(1, 2), rotate(k).transpose(1, 2), v.transpose(1, 2))
        return self.proj(out.transpose(1, 2).reshape(batch, length, dim))


class FusedBlock(nn.Module):
    """adaLN-modulated self-attention and MLP around a plain cross-attention."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim, elementwise_affine=False)
        self.modulation = nn.Linear(dim, 6 * dim)
        self.attn, self.cross = FusedSelfAttention(dim, heads), CrossAttention(dim, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(approximate="tanh"), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor, time: Tensor, text: Tensor, angles: Tensor) -> Tensor:
        """(B, S, dim), (B, dim), (B, L, dim), (S, head_dim/2) -> (B, S, dim)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(time))[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, angles)
        x = x + self.cross(self.norm2(x), text)
        return x + gate2 * self.mlp(self.norm3(x) * (1 + scale2) + shift2)


class FusedDiT(nn.Module):
    """(a): a fused qkv Linear in an attention module of its own, adaLN modulation, 3-D rope."""

    def __init__(
        self, channels: int = 4, heads: int = 3, head_dim: int = 16, text_dim: int = 24, layers: int = 2
    ) -> None:
        super().__init__()
        dim = heads * head_dim
        self.widths = (head_dim // 2 - 2 * (head_dim // 6), head_dim // 6, head_dim // 6)
        self.ends = Ends(channels, dim, text_dim)
        self.blocks = nn.ModuleList(FusedBlock(dim, heads) for _ in range(layers))

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """(B, C, T, H, W), (B,), (B, L, text_dim) -> (B, C, T, H, W)."""
        tokens, grid = self.ends.tokens(x)
        time, text = self.ends.conditions(t, text)
        angles = grid_angles(grid, self.widths, tokens.device)
        for block in self.blocks:
            tokens = block(tokens, time, text, angles)
        return self.ends.video(tokens, time, grid)


# ---------------------------------------------------------------- (b) separate Linears, qk-norm, complex rope


class RearrangeSelfAttention(nn.Module):
    """Separate q, k, v Linears, RMSNorm per head, rope by complex multiplication; attention arguments by keyword."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(dim, dim, bias=bias) for bias in (False, False, False, True))
        self.q_norm, self.k_norm = nn.RMSNorm(dim // heads, eps=1e-6), nn.RMSNorm(dim // heads, eps=1e-6)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        """(B, S, dim), complex (S, head_dim/2) -> (B, S, dim)."""
        q = rearrange(self.wq(x), "b s (h d) -> b h s d", h=self.heads)
        k = rearrange(self.wk(x), "b s (h d) -> b h s d", h=self.heads)
        v = rearrange(self.wv(x), "b s (h d) -> b h s d", h=self.heads)

        def rotate(y: Tensor) -> Tensor:
            pairs = torch.view_as_complex(y.float().unflatten(-1, (-1, 2)))
            return torch.view_as_real(pairs * rotation).flatten(-2).type_as(y)

        q, k = rotate(self.q_norm(q)), rotate(self.k_norm(k))
        out = F.scaled_dot_product_attention(query=q, key=k, value=v)
        return self.wo(rearrange(out, "b h s d -> b s (h d)"))


class RearrangeBlock(nn.Module):
    """Pre-norm block whose time embedding is simply added."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = nn.RMSNorm(dim), nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.time = nn.Linear(dim, dim)
        self.self_attn, self.cross_attn = RearrangeSelfAttention(dim, heads), CrossAttention(dim, heads)
        self.gate_up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor, time: Tensor, text: Tensor, rotation: Tensor) -> Tensor:
        """(B, S, dim), (B, dim), (B, L, dim), complex (S, head_dim/2) -> (B, S, dim)."""
        x = x + self.self_attn(self.norm1(x + self.time(time)[:, None]), rotation)
        x = x + self.cross_attn(self.norm2(x), text)
        gate, up = self.gate_up(self.norm3(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class RearrangeDiT(nn.Module):
    """(b): separate q, k, v Linears with rearranges, qk RMSNorm, rope by complex multiplication."""

    def __init__(
        self, channels: int = 4, heads: int = 2, head_dim: int = 24, text_dim: int = 20, layers: int = 2
    ) -> None:
        super().__init__()
        dim = heads * head_dim
        self.widths = (head_dim // 2 - 2 * (head_dim // 6), head_dim // 6, head_dim // 6)
        self.ends = Ends(channels, dim, text_dim)
        self.layers = nn.ModuleList(RearrangeBlock(dim, heads) for _ in range(layers))

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """(B, C, T, H, W), (B,), (B, L, text_dim) -> (B, C, T, H, W)."""
        tokens, grid = self.ends.tokens(x)
        time, text = self.ends.conditions(t, text)
        angles = grid_angles(grid, self.widths, tokens.device)
        rotation = torch.polar(torch.ones_like(angles), angles)
        for layer in self.layers:
            tokens = layer(tokens, time, text, rotation)
        return self.ends.video(tokens, time, grid)


# ---------------------------------------------------------------- (c) attention in the block's own forward


class InlineBlock(nn.Module):
    """Self-attention and text cross-attention in one forward; all eight Linears hang on the block itself."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.text_q, self.text_k, self.text_v, self.text_out = (nn.Linear(dim, dim) for _ in range(4))
        self.gates = nn.Linear(dim, 3 * dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def split(self, x: Tensor) -> Tensor:
        """(B, S, dim) -> (B, heads, S, head_dim)."""
        return x.view(x.shape[0], x.shape[1], self.heads, -1).transpose(1, 2)

    def forward(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        """(B, S, dim), (B, dim), (B, L, dim) -> (B, S, dim)."""
        gate1, gate2, gate3 = self.gates(F.silu(time))[:, None].chunk(3, dim=-1)
        y = self.norm1(x)
        y = F.scaled_dot_product_attention(self.split(self.q(y)), self.split(self.k(y)), self.split(self.v(y)))
        x = x + gate1 * self.out(y.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        q, k, v = self.split(self.text_q(y)), self.split(self.text_k(text)), self.split(self.text_v(text))
        y = F.scaled_dot_product_attention(q, k, v)
        x = x + gate2 * self.text_out(y.transpose(1, 2).flatten(2))
        return x + gate3 * self.mlp(self.norm3(x))


class InlineDiT(nn.Module):
    """(c): no attention module, and absolute positions added once: nothing stands between Linear and attention."""

    def __init__(
        self, channels: int = 4, heads: int = 4, head_dim: int = 12, text_dim: int = 28, layers: int = 2
    ) -> None:
        super().__init__()
        dim = heads * head_dim
        self.ends = Ends(channels, dim, text_dim)
        self.position = nn.Linear(dim, dim)
        self.blocks = nn.ModuleList(InlineBlock(dim, heads) for _ in range(layers))

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """(B, C, T, H, W), (B,), (B, L, text_dim) -> (B, C, T, H, W)."""
        tokens, grid = self.ends.tokens(x)
        time, text = self.ends.conditions(t, text)
        third = tokens.shape[-1] // 6
        angles = grid_angles(grid, (third, third, third), tokens.device)
        tokens = tokens + self.position(torch.cat([angles.sin(), angles.cos()], dim=-1).to(tokens.dtype))
        for block in self.blocks:
            tokens = block(tokens, time, text)
        return self.ends.video(tokens, time, grid)
