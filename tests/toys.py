"""Attention modules in every style that a matcher has to tell apart. Tokens S, width 16, two heads of 8."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

WIDTH, HEADS = 16, 2

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def heads(x: Tensor) -> Tensor:
    """(B, S, C) -> (B, H, S, D), a permuted view."""
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def positional(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def keywords(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query=q, key=k, value=v, scale=0.5)


def mixed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, value=v, dropout_p=0.0, is_causal=False)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, None, 0.0, True)


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril(3)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, dropout_p=0.1)


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True)


def rotated_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Position encoding by empty_like and setitem, as in Wan."""

    def rotate(x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[-2], dtype=x.dtype).unsqueeze(-1) * 0.1
        even, odd = x[..., 0::2], x[..., 1::2]
        out = torch.empty_like(x)
        out[..., 0::2] = even * angle.cos() - odd * angle.sin()
        out[..., 1::2] = even * angle.sin() + odd * angle.cos()
        return out.type_as(x)

    return F.scaled_dot_product_attention(rotate(q), rotate(k), v)


class SelfAttention(nn.Module):
    """Separate projections and one attention call."""

    def __init__(self, attend: Attend = positional) -> None:
        super().__init__()
        self.attend = attend
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        out = self.attend(heads(self.q(x)), heads(self.k(x)), heads(self.v(x)))
        result: Tensor = self.o(out.transpose(1, 2).flatten(2))
        return result


class CrossAttention(SelfAttention):
    """Keys and values from a context with as many tokens as there are queries."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x.flip(1) * 1.5 if context is None else context
        out = self.attend(heads(self.q(x)), heads(self.k(context)), heads(self.v(context)))
        result: Tensor = self.o(out.transpose(1, 2).flatten(2))
        return result


class Int8Linear(nn.Module):
    """Stores integers, as quantisers do: no autograd edge, no floating-point parameter."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("weight", (linear.weight.detach() * 64).round().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight.to(x.dtype) / 64).T


class QuantisedLinear(nn.Linear):
    """Rounds its weight to eight bits whenever it runs."""

    def forward(self, x: Tensor) -> Tensor:
        step = self.weight.abs().max() / 127
        return F.linear(x, (self.weight / step).round() * step, self.bias)


class Stack(nn.Module):
    """Residual blocks of attention modules, optionally under activation checkpointing."""

    def __init__(self, *layers: nn.Module, recompute: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + (checkpoint(layer, x, use_reentrant=False) if self.recompute else layer(x))
        return x


def tokens(count: int = 70, batch: int = 2, **kwargs: Any) -> Tensor:
    """Random (B, S, C) input, always the same."""
    generator = torch.Generator().manual_seed(count)
    return torch.randn(batch, count, WIDTH, generator=generator, **kwargs)
