"""One small video DiT whose self-attention is written in one of the ways that people call attention.

`StyledDiT` is the same for all: patches, complex rope, cross-attention to the text, a gated MLP. Every style takes
``x`` (B, S, dim) and the rotation, complex (S, head_dim/2).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

import salad_compile
from tests.models.handwritten import CrossAttention, Ends, grid_angles


def rotated(x: Tensor, rotation: Tensor) -> Tensor:
    """Rope by complex multiplication; tokens are the axis before the last."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2).type_as(x)


class Style(nn.Module):
    """Separate q, k, v Linears; subclasses say how they attend."""

    def __init__(self, dim: int, heads: int, key_heads: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        keys = dim // heads * (key_heads or heads)
        self.q, self.k, self.v, self.o = (
            nn.Linear(dim, dim),
            nn.Linear(dim, keys),
            nn.Linear(dim, keys),
            nn.Linear(dim, dim),
        )

    def heads_of(self, x: Tensor) -> Tensor:
        """(..., S, H * D) -> (..., H, S, D)."""
        return x.unflatten(-1, (-1, self.o.in_features // self.heads)).transpose(-2, -3)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        """(B, S, dim) -> (B, S, dim)."""
        q, k, v = (self.heads_of(linear(x)) for linear in (self.q, self.k, self.v))
        out = self.attend(rotated(q, rotation), rotated(k, rotation), v)
        return self.o(out.transpose(-2, -3).flatten(-2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, H, S, D), three times -> (B, H, S, D)."""
        raise NotImplementedError


# ---------------------------------------------------------------- operators of one's own


# No gradient formulas: what is converted never runs them.
@torch.library.custom_op("toy::varlen_attention", mutates_args=())
def varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    """Like flash_attn_varlen_func: samples packed one after another, (B * S, H, D)."""
    ends = cu_seqlens.tolist()
    parts = []
    for begin, end in itertools.pairwise(ends):
        one, two, three = (tensor[begin:end].transpose(0, 1) for tensor in (q, k, v))
        parts.append(F.scaled_dot_product_attention(one, two, three, scale=scale).transpose(0, 1))
    return torch.cat(parts)


@varlen_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    return torch.empty_like(q)


@salad_compile.attention_adapter(varlen_attention)
def _(q, k, v, cu_seqlens, scale):  # type: ignore[no-untyped-def]
    return salad_compile.AttentionArguments(q, k, v, scale=scale, layout="SHD", batch=cu_seqlens)


@torch.library.custom_op("toy::flash_attention", mutates_args=())
def flash_attention(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Like flash_attn's operator: (B, S, H, D), and the log-sum-exp beside the result."""
    heads_first = [tensor.transpose(1, 2) for tensor in (q, k, v)]
    scale = softmax_scale or q.shape[-1] ** -0.5
    lse = (heads_first[0] @ heads_first[1].transpose(2, 3) * scale).logsumexp(-1)
    return F.scaled_dot_product_attention(*heads_first, scale=scale).transpose(1, 2).contiguous(), lse


@flash_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[0], q.shape[2], q.shape[1])


@salad_compile.attention_adapter(torch.ops.toy.flash_attention)
def _(q, k, v, softmax_scale=None):  # type: ignore[no-untyped-def]
    return salad_compile.AttentionArguments(q, k, v, scale=softmax_scale, layout="BSHD", output=0)


class Varlen(Style):
    """Packed samples, as in the original code of Wan."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, length = q.shape[0], q.shape[2]
        ends = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * length
        packed = [tensor.transpose(1, 2).flatten(0, 1) for tensor in (q, k, v)]
        out = varlen_attention(*packed, ends, 0.2)
        return out.unflatten(0, (batch, length)).transpose(1, 2)


class Flash(Style):
    """An operator that answers two results."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, _lse = torch.ops.toy.flash_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return out.transpose(1, 2)


class Flex(Style):
    """flex_attention without a mask."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flex_attention(q, k, v)
        assert isinstance(out, Tensor)
        return out


# ---------------------------------------------------------------- by hand, and torch's own module


class Manual(Style):
    """Softmax of scaled scores, in fp32."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(q.shape[-1])
        weights = F.softmax(scores.float(), dim=-1).to(v.dtype)
        return torch.matmul(F.dropout(weights, 0.0), v)


class Einsum(Style):
    """Einsum on (B, S, H, D), the query scaled beforehand."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        weights = torch.einsum("bqhd,bkhd->bhqk", q * 0.3, k).softmax(dim=-1)
        return torch.einsum("bhqk,bkhd->bqhd", weights, v).transpose(1, 2)


class Multihead(nn.Module):
    """nn.MultiheadAttention."""

    def __init__(self, dim: int, heads: int, batch_first: bool = True) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(dim, heads, batch_first=batch_first)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        """(B, S, dim) -> (B, S, dim); rotates what the attention reads, there is no way in between."""
        x = rotated(x.unflatten(-1, (-1, 2 * rotation.shape[-1])).transpose(1, 2), rotation).transpose(1, 2).flatten(2)
        if self.inner.batch_first:
            return self.inner(x, x, x, need_weights=False)[0]
        x = x.transpose(0, 1)
        return self.inner(x, x, x, need_weights=False)[0].transpose(0, 1)


# ---------------------------------------------------------------- scaled_dot_product_attention, out of the ordinary


class Unbatched(Style):
    """Tokens (S, dim), heads (H, S, D)."""

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        return super().forward(x[0], rotation)[None]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class Grouped(nn.Module):
    """One qkv Linear with fewer key and value heads."""

    def __init__(self, dim: int, heads: int, key_heads: int = 2) -> None:
        super().__init__()
        self.split = [heads, key_heads, key_heads]
        self.width = dim // heads
        self.qkv, self.o = nn.Linear(dim, self.width * sum(self.split)), nn.Linear(dim, dim)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        """(B, S, dim) -> (B, S, dim)."""
        heads = self.qkv(x).unflatten(-1, (-1, self.width)).transpose(1, 2)
        q, k, v = heads.split(self.split, dim=1)
        q, k = rotated(q, rotation), rotated(k, rotation)
        out = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.o(out.transpose(1, 2).flatten(2))


class Scaled(Style):
    """A scale of its own."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=0.6)


class Dropped(Style):
    """Attention weights are dropped while training."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.25 if self.training else 0.0)


# ---------------------------------------------------------------- the model around them


class StyledBlock(nn.Module):
    """Pre-norm block whose time embedding is simply added."""

    def __init__(self, dim: int, attention: nn.Module, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = nn.RMSNorm(dim), nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.time = nn.Linear(dim, dim)
        self.attn, self.cross = attention, CrossAttention(dim, heads)
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor, time: Tensor, text: Tensor, rotation: Tensor) -> Tensor:
        """(B, S, dim), (B, dim), (B, L, dim), complex (S, head_dim/2) -> (B, S, dim)."""
        x = x + self.attn(self.norm1(x + self.time(time)[:, None]), rotation)
        x = x + self.cross(self.norm2(x), text)
        return x + self.down(F.silu(self.up(self.norm3(x))))


class StyledDiT(nn.Module):
    """The model: ``x`` (B, C, T, H, W), ``t`` (B,) and ``text`` (B, L, text_dim), like those of handwritten.py."""

    def __init__(
        self,
        style: Callable[[int, int], nn.Module],
        channels: int = 4,
        heads: int = 4,
        head_dim: int = 12,
        text_dim: int = 20,
        layers: int = 2,
    ) -> None:
        super().__init__()
        dim = heads * head_dim
        self.widths = (head_dim // 2 - 2 * (head_dim // 6), head_dim // 6, head_dim // 6)
        self.ends = Ends(channels, dim, text_dim)
        self.blocks = nn.ModuleList(StyledBlock(dim, style(dim, heads), heads) for _ in range(layers))

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """(B, C, T, H, W), (B,), (B, L, text_dim) -> (B, C, T, H, W)."""
        tokens, grid = self.ends.tokens(x)
        time, text = self.ends.conditions(t, text)
        angles = grid_angles(grid, self.widths, tokens.device)
        rotation = torch.polar(torch.ones_like(angles), angles)
        for block in self.blocks:
            tokens = block(tokens, time, text, rotation)
        return self.ends.video(tokens, time, grid)
