"""What is drawn from a seed: a video DiT with some of what real model code does around its attention."""

from __future__ import annotations

import copy
import functools
import math
import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support import seeded

HEADS, HEAD_DIM = 2, 8
WIDTH = HEADS * HEAD_DIM
LAYERS = 2


@dataclass(frozen=True)
class Style:
    """What is drawn: one choice for each feature, from :data:`COMMON`, and of up to three from :data:`ODD`."""

    seed: int
    grid: tuple[int, int, int]
    batch: int
    projection: str
    layout: str
    text: str
    mask: str
    rope: str
    norm: str
    call: str
    decorated: str
    writes: str
    shared: bool
    region: str
    root: str


COMMON: dict[str, tuple[Any, ...]] = {
    "grid": ((2, 7, 9), (3, 6, 7), (5, 5, 5), (2, 8, 8), (1, 11, 12)),
    "batch": (1, 2),
    "projection": ("separate", "fused"),
    "layout": ("batch first",),
    "text": ("none", "before", "after"),
    "mask": ("none",),
    "rope": ("none", "pairs", "halves", "in place", "complex"),
    "norm": ("none", "rms"),
    "call": ("sdpa",),
    "decorated": ("no",),
    "writes": ("no",),
    "shared": (False,),
    "region": ("none",),
    "root": ("called",),
}
ODD: dict[str, tuple[Any, ...]] = {
    "projection": (
        *("fused with mlp", "gates within heads", "tuple", "convolution", "convolution over frames", "keyword"),
        *("stacked", "matrix", "wrapped"),
    ),
    "layout": ("sequence first", "heads in batch", "permuted"),
    "text": ("registers", "padded", "hstack", "buffer", "nested", "both sides"),
    "mask": ("keys",),
    "call": ("manual", "manual scores.shape", "per sample", "trimmed"),
    "decorated": ("wrapped", "no_grad text", "no_grad", "inference_mode"),
    "writes": ("projection", "output"),
    "shared": (True,),
    "region": ("autocast off", "autocast", "no_grad tables", "tensor bounds", "deep copy"),
    "root": ("bypassed", "wrapped later", "inside another", "replaced later"),
}


REGISTERS = ("registers", "both sides", "nested")


def style_of(seed: int) -> Style:
    """The model of a seed, the same everywhere."""
    draw = random.Random(seed)
    chosen = {name: draw.choice(values) for name, values in COMMON.items()}
    for name in draw.sample(sorted(ODD), draw.choice((0, 1, 1, 2, 3))):
        chosen[name] = draw.choice(ODD[name])
    return Style(seed, **chosen)


class TupleLinear(nn.Linear):
    """Returns its bias too, as linear layers that may be sharded do."""

    def forward(self, x: Tensor) -> Any:
        return F.linear(x, self.weight, self.bias), None


class Matrix(nn.Module):
    """A linear layer that says nothing of its widths, and holds its weight as (in, out)."""

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(features, outputs) / math.sqrt(features))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w


class Wrapper(nn.Module):
    """A linear layer within another module, as adapters and parallel layers have it."""

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__()
        self.base = nn.Linear(features, outputs)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.base(x), None


class Projections(nn.Module):
    """(B, S, C) -> query, key, value (B, S, H, D)."""

    def __init__(self, style: Style) -> None:
        super().__init__()
        self.kind = style.projection
        self.grid = style.grid
        if self.kind in ("fused", "fused with mlp", "gates within heads"):
            self.extra = {"fused with mlp": 12, "gates within heads": HEADS}.get(self.kind, 0)
            self.qkv = nn.Linear(WIDTH, 3 * WIDTH + self.extra)
        else:
            linear: Callable[..., nn.Module] = {
                "tuple": TupleLinear,
                "convolution": functools.partial(nn.Conv1d, kernel_size=1),
                "convolution over frames": functools.partial(nn.Conv2d, kernel_size=1),
                "matrix": Matrix,
                "wrapped": Wrapper,
            }.get(self.kind, nn.Linear)
            self.q, self.k, self.v = (linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.kind == "gates within heads":  # each head has its query, key, value and gate side by side
            parts = (
                self.qkv(x).unflatten(-1, (HEADS, 3 * HEAD_DIM + 1)).split([HEAD_DIM, HEAD_DIM, HEAD_DIM, 1], dim=-1)
            )
            return parts[0], parts[1], parts[2] * parts[3].sigmoid()
        if hasattr(self, "qkv"):
            query, key, value, _ = self.qkv(x).split([WIDTH, WIDTH, WIDTH, self.extra], dim=-1)
        else:
            query, key, value = (self.apply_one(linear, x) for linear in (self.q, self.k, self.v))
        if self.kind == "stacked":
            query, key, value = torch.cat([query, key, value]).chunk(3)
        query, key, value = (t.unflatten(-1, (HEADS, HEAD_DIM)) for t in (query, key, value))
        return query, key, value

    def apply_one(self, linear: nn.Module, x: Tensor) -> Tensor:
        if self.kind in ("tuple", "wrapped"):
            return linear(x)[0]  # type: ignore[no-any-return]
        if self.kind == "convolution over frames":  # (B, C, S, 1): text may be among the tokens
            return linear(x.transpose(1, 2).unsqueeze(-1)).squeeze(-1).transpose(1, 2)  # type: ignore[no-any-return]
        if self.kind == "convolution":
            return linear(x.transpose(1, 2)).transpose(1, 2)  # type: ignore[no-any-return]
        return linear(input=x) if self.kind == "keyword" else linear(x)  # type: ignore[no-any-return]


def angles(x: Tensor, region: str) -> Tensor:
    """(S, 1, D / 2): of the tokens of (B, S, H, D)."""
    with torch.no_grad() if region == "no_grad tables" else nullcontext():
        frequencies = 0.3 ** torch.arange(HEAD_DIM // 2, dtype=x.dtype)
        angle = (torch.arange(x.shape[1], dtype=x.dtype)[:, None] * frequencies)[:, None]
    return copy.deepcopy(angle) if region == "deep copy" else angle


def rotate(x: Tensor, kind: str, region: str) -> Tensor:
    """Rotary positions along axis 1 of (B, S, H, D)."""
    if kind == "none":
        return x
    angle = angles(x, region)
    if kind == "halves":
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], dim=-1)
    if kind == "complex":
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2).type_as(x)
    even, odd = x[..., 0::2], x[..., 1::2]
    if kind == "in place":
        out = torch.empty_like(x)
        out[..., 0::2] = even * angle.cos() - odd * angle.sin()
        out[..., 1::2] = even * angle.sin() + odd * angle.cos()
        return out
    return torch.stack([even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()], -1).flatten(-2)


def attend(style: Style, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """(B, H, S, D) each, in the way of the style."""
    if style.call == "per sample":
        parts = [
            F.scaled_dot_product_attention(
                query[i : i + 1], key[i : i + 1], value[i : i + 1], attn_mask=None if mask is None else mask[i : i + 1]
            )
            for i in range(query.shape[0])
        ]
        return torch.cat(parts)
    if style.call.startswith("manual"):
        scores = query @ key.transpose(-1, -2) / math.sqrt(HEAD_DIM)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        if style.call == "manual scores.shape":
            assert scores.shape[-1] == key.shape[-2]
        return scores.softmax(dim=-1) @ value
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def cast(style: Style) -> AbstractContextManager[Any]:
    """The region of a style that changes dtypes, or keeps them."""
    if style.region == "autocast off":
        return torch.autocast("cpu", enabled=False)
    return torch.autocast("cpu", dtype=torch.bfloat16) if style.region == "autocast" else nullcontext()


class Attention(nn.Module):
    def __init__(self, style: Style) -> None:
        super().__init__()
        self.style = style
        self.projections = Projections(style)
        self.norms = nn.ModuleList(nn.RMSNorm(HEAD_DIM) if style.norm == "rms" else nn.Identity() for _ in range(2))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        style = self.style
        with cast(style):
            query, key, value = self.projections(x)
            if style.writes == "projection":
                query += 0.1
            out = self.attend(query, key, value, mask)
        out = self.out(out.to(x.dtype))
        if style.writes == "output":
            out *= 1.5
        return out

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """(B, S, H, D) each -> (B, S, C)."""
        style = self.style
        if style.region == "tensor bounds":
            bound = torch.tensor([query.shape[1], query.shape[0]])
            query, key = query[:, : bound[0]], key[:, : bound[0]]
        query, key = (
            rotate(norm(t), style.rope, style.region) for norm, t in zip(self.norms, (query, key), strict=True)
        )
        query, key = query.type_as(value), key.type_as(value)
        if style.layout == "sequence first":
            query, key, value = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (query, key, value))
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        if style.call == "trimmed" and mask is None:
            whole = query.shape[2]
            query, key, value = (t[:, :, : whole - 3] for t in (query, key, value))
        out = self.call(query, key, value, mask)
        out = out.transpose(1, 2).flatten(2)
        if style.call == "trimmed" and mask is None:
            out = F.pad(out, (0, 0, 0, 3))
        return out

    def call(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        style = self.style
        if style.layout == "heads in batch" and mask is None:
            folded = [t.reshape(-1, 1, t.shape[2], HEAD_DIM) for t in (query, key, value)]
            return attend(style, *folded, None).reshape(query.shape)
        if style.layout == "permuted" and mask is None:
            order = torch.arange(query.shape[2] - 1, -1, -1)
            return attend(style, *(t[:, :, order] for t in (query, key, value)), None)[:, :, order]
        return attend(style, query, key, value, mask)


class Block(nn.Module):
    def __init__(self, style: Style) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention(style)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attention(self.norm(x), mask)
        return x + self.mlp(self.norm2(x))


def wrapped(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    return call


class RandomModel(nn.Module):
    """Latents (B, 3, T, H, W), text (B, L, WIDTH) -> video tokens (B, S, WIDTH)."""

    def __init__(self, style: Style) -> None:
        super().__init__()
        self.style = style
        self.patch, self.embed = nn.Conv3d(3, WIDTH, 1), nn.Linear(WIDTH, WIDTH)
        self.registers = nn.Parameter(torch.randn(1, 5, WIDTH)) if style.text in REGISTERS else None
        block = Block(style)
        self.blocks = nn.ModuleList(block if style.shared else Block(style) for _ in range(LAYERS))
        decorator: Any = {
            "wrapped": wrapped,
            "no_grad": torch.no_grad(),
            "inference_mode": torch.inference_mode(),
        }.get(style.decorated)
        if decorator is not None:
            self.forward = decorator(self.forward)  # type: ignore[method-assign]

    def forward(self, latents: Tensor, text: Tensor, valid: Tensor) -> Tensor:
        return self.all(latents, text, valid)

    def all(self, latents: Tensor, text: Tensor, valid: Tensor) -> Tensor:
        """The forward, which others may call past this module's own."""
        video = self.patch(latents).flatten(2).transpose(1, 2)
        tokens = video.shape[1]
        words = self.words(text)
        x, start = self.join(video, words)
        mask = self.keys(valid, x.shape[1], start, tokens) if self.style.mask == "keys" else None
        for block in self.blocks:
            x = block(x, mask)
        return x[:, start : start + tokens]

    def words(self, text: Tensor) -> Tensor:
        if self.style.decorated == "no_grad text":
            with torch.no_grad():
                text = text[:, :-2].clone()
        return self.embed(text)  # type: ignore[no-any-return]

    def join(self, video: Tensor, words: Tensor) -> tuple[Tensor, int]:
        """The sequence, and where the video starts in it."""
        style = self.style
        if style.text == "none":
            return video + words.mean(1, keepdim=True), 0
        if style.text == "after":
            return torch.cat([video, words], dim=1), 0
        if self.registers is not None and style.text == "both sides":
            registers = self.registers.expand(video.shape[0], -1, -1)
            return torch.cat([words, video, registers], dim=1), words.shape[1]
        if self.registers is not None:
            words = torch.cat([self.registers.expand(video.shape[0], -1, -1), words], dim=1)
        if style.text == "nested":
            words = torch.cat([torch.cat([words, words[:, :1]], dim=1), torch.zeros_like(words[:, :2])], dim=1)
        if style.text == "padded":
            words = F.pad(words, (0, 0, 0, 4))
        if style.text == "hstack":
            return torch.hstack([words, video]), words.shape[1]
        if style.text == "buffer":
            both = video.new_zeros(video.shape[0], words.shape[1] + video.shape[1], WIDTH)
            both[:, : words.shape[1]] = words
            both[:, words.shape[1] :] = video
            return both, words.shape[1]
        return torch.cat([words, video], dim=1), words.shape[1]

    def keys(self, valid: Tensor, length: int, start: int, tokens: int) -> Tensor:
        """(B, 1, 1, S): the video, and of the rest what is valid."""
        rest = valid[:, : length - tokens]
        video = valid.new_ones(valid.shape[0], tokens)
        parts = [video, rest] if start == 0 else [rest, video]
        return torch.cat(parts, dim=1)[:, None, None]


class Outer(nn.Module):
    """A model inside another module."""

    def __init__(self, inner: RandomModel) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, latents: Tensor, text: Tensor, valid: Tensor) -> Tensor:
        out: Tensor = self.inner(latents, text, valid)
        return out


def build(style: Style) -> nn.Module:
    with seeded(style.seed):
        model = RandomModel(style)
    return Outer(model) if style.root == "inside another" else model


def change_root(style: Style, model: nn.Module) -> None:
    """What is done to the root's forward after conversion."""
    if style.root == "wrapped later":
        model.forward = wrapped(model.forward)
    elif style.root == "replaced later":
        model.forward = functools.partial(RandomModel.forward, model)


def root_of(style: Style, model: nn.Module) -> Callable[..., Tensor]:
    """What is called."""
    call: Callable[..., Tensor] = model.all if style.root == "bypassed" and isinstance(model, RandomModel) else model
    return call


def inputs_of(style: Style) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(style.seed)
    valid = torch.ones(style.batch, 40, dtype=torch.bool)
    valid[0, :3] = False
    return {
        "latents": 2 * torch.randn(style.batch, 3, *style.grid, generator=generator),
        "text": 2 * torch.randn(style.batch, 13, WIDTH, generator=generator),
        "valid": valid,
    }
