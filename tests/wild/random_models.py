"""Random video DiTs over what real model code does around its attention.

`python -m tests.wild.random_models --count 300`. Each model is drawn from a seed. It is right, or refused with a
reason:

- right: at sparsity 0 it computes what the dense model does; text is known to be text; gates belong to their own
  sample; gradients arrive; compiled (a share of the models) it computes what it does uncompiled, gradients included;
- refused: `convert` raises an error of ours that gives a reason, and leaves the model as it was.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import math
import random
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import salad_compile
from salad_compile.definition import linear_branch
from salad_compile.errors import SaladError
from salad_compile.sites.branch import branches
from tests.support import TINY, Recorder, Result, assert_same, randomise_branches, relative_error, seeded

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
}
ODD: dict[str, tuple[Any, ...]] = {
    "projection": ("fused with mlp", "tuple", "convolution", "keyword", "stacked"),
    "layout": ("sequence first", "heads in batch", "permuted"),
    "text": ("registers", "padded", "hstack", "buffer"),
    "mask": ("keys",),
    "call": ("manual", "manual scores.shape", "per sample", "trimmed"),
    "decorated": ("wrapped", "no_grad text"),
    "writes": ("projection", "output"),
    "shared": (True,),
}


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


class Projections(nn.Module):
    """(B, S, C) -> query, key, value (B, S, H, D)."""

    def __init__(self, style: Style) -> None:
        super().__init__()
        self.kind = style.projection
        if self.kind in ("fused", "fused with mlp"):
            self.extra = 12 if self.kind == "fused with mlp" else 0
            self.qkv = nn.Linear(WIDTH, 3 * WIDTH + self.extra)
        else:
            linear: Callable[..., nn.Module] = {
                "tuple": TupleLinear,
                "convolution": functools.partial(nn.Conv1d, kernel_size=1),
            }.get(self.kind, nn.Linear)
            self.q, self.k, self.v = (linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if hasattr(self, "qkv"):
            query, key, value, _ = self.qkv(x).split([WIDTH, WIDTH, WIDTH, self.extra], dim=-1)
        else:
            query, key, value = (self.apply_one(linear, x) for linear in (self.q, self.k, self.v))
        if self.kind == "stacked":
            query, key, value = torch.cat([query, key, value]).chunk(3)
        query, key, value = (t.unflatten(-1, (HEADS, HEAD_DIM)) for t in (query, key, value))
        return query, key, value

    def apply_one(self, linear: nn.Module, x: Tensor) -> Tensor:
        if self.kind == "tuple":
            return linear(x)[0]  # type: ignore[no-any-return]
        if self.kind == "convolution":
            return linear(x.transpose(1, 2)).transpose(1, 2)  # type: ignore[no-any-return]
        return linear(input=x) if self.kind == "keyword" else linear(x)  # type: ignore[no-any-return]


def rotate(x: Tensor, kind: str) -> Tensor:
    """Rotary positions along axis 1 of (B, S, H, D)."""
    if kind == "none":
        return x
    frequencies = 0.3 ** torch.arange(HEAD_DIM // 2, dtype=x.dtype)
    angle = (torch.arange(x.shape[1], dtype=x.dtype)[:, None] * frequencies)[:, None]
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


class Attention(nn.Module):
    def __init__(self, style: Style) -> None:
        super().__init__()
        self.style = style
        self.projections = Projections(style)
        self.norms = nn.ModuleList(nn.RMSNorm(HEAD_DIM) if style.norm == "rms" else nn.Identity() for _ in range(2))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        style = self.style
        query, key, value = self.projections(x)
        if style.writes == "projection":
            query += 0.1
        query, key = (rotate(norm(t), style.rope) for norm, t in zip(self.norms, (query, key), strict=True))
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
        out = self.out(out)
        if style.writes == "output":
            out *= 1.5
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
        self.registers = nn.Parameter(torch.randn(1, 5, WIDTH)) if style.text == "registers" else None
        block = Block(style)
        self.blocks = nn.ModuleList(block if style.shared else Block(style) for _ in range(LAYERS))
        if style.decorated == "wrapped":
            self.forward = wrapped(self.forward)  # type: ignore[method-assign]

    def forward(self, latents: Tensor, text: Tensor, valid: Tensor) -> Tensor:
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
        if style.text == "registers" and self.registers is not None:
            words = torch.cat([self.registers.expand(video.shape[0], -1, -1), words], dim=1)
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


def build(style: Style) -> RandomModel:
    with seeded(style.seed):
        return RandomModel(style)


def inputs_of(style: Style) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(style.seed)
    valid = torch.ones(style.batch, 40, dtype=torch.bool)
    valid[0, :3] = False
    return {
        "latents": 2 * torch.randn(style.batch, 3, *style.grid, generator=generator),
        "text": 2 * torch.randn(style.batch, 13, WIDTH, generator=generator),
        "valid": valid,
    }


def convert(style: Style, **changes: Any) -> RandomModel:
    model: RandomModel = salad_compile.convert(
        build(style), dataclasses.replace(TINY, **changes), example_inputs=inputs_of(style)
    )
    return model


@torch.no_grad()
def output_of(model: nn.Module, style: Style) -> Tensor:
    out: Tensor = model(**inputs_of(style))
    return out


def run(model: Callable[..., Any], owner: nn.Module, style: Style) -> Result:
    owner.zero_grad(set_to_none=True)
    out = model(**inputs_of(style))
    with seeded(99):
        (out * torch.randn(out.shape)).sum().backward()
    names = ((name.replace("_orig_mod.", ""), p) for name, p in owner.named_parameters())
    return Result(out.detach(), {name: p.grad.clone() for name, p in names if p.grad is not None})


def check(style: Style, *, compiled: bool) -> str:
    """`right`, or `refused: reason`. Raises AssertionError, or an error that is not ours, where it is wrong."""
    dense_model = build(style)
    dense = output_of(dense_model, style)
    before = {name: value.clone() for name, value in dense_model.state_dict().items()}
    try:
        salad_compile.convert(dense_model, TINY, example_inputs=inputs_of(style))
    except SaladError as error:
        after = dense_model.state_dict()
        assert before.keys() == after.keys(), "a refusal changed the model"
        assert all(torch.equal(value, after[name]) for name, value in before.items()), "a refusal changed weights"
        return f"refused: {reason_of(error)}"
    assert relative_error(output_of(convert(style, sparsity=0.0), style), dense) <= 1e-5, "sparsity 0 is not dense"
    model = convert(style)
    check_text(style, model)
    check_gates(style, model)
    randomise_branches(model)
    expected = run(model, model, style)
    salad = {name for name in expected.gradients if ".salad." in name}
    assert salad == {name for name, _ in model.named_parameters() if ".salad." in name}, "a branch has no gradient"
    if compiled:
        torch._dynamo.reset()
        recorder = Recorder({"lowering": "eager"})
        assert_same(run(torch.compile(model, backend=recorder), model, style), expected, may_vanish=lambda name: True)
        assert recorder.after["salad.block_sparse_attention"] > 0, "compiled, nothing was rewritten"
    return "right"


def check_text(style: Style, model: RandomModel) -> None:
    """What is no video is known to be none."""
    words = 0 if style.text == "none" else 13 - 2 * (style.decorated == "no_grad text")
    expected = words + {"registers": 5, "padded": 4}.get(style.text, 0)
    found = {branch.record.text_tokens for branch in branches(model).values()}
    assert found == {expected}, f"{found} text tokens found where there are {expected}"


def check_gates(style: Style, model: RandomModel) -> None:
    """The samples of a batch, swapped, give the same outputs swapped: no gate acts on another sample.

    The linear branch is a projection to ones, so that all that it adds to a token is that token's gate.
    """
    if style.batch < 2:
        return
    randomise_branches(model)
    with torch.no_grad():
        for branch in branches(model).values():
            for name, parameter in branch.named_parameters():
                if "proj" in name:
                    parameter.fill_(1.0 if name.endswith("bias") else 0.0)
    inputs = inputs_of(style)
    inputs["valid"] = torch.ones_like(inputs["valid"])
    swapped = {name: value.flip(0) for name, value in inputs.items()}
    with torch.no_grad(), mock.patch.object(linear_branch, "linear_attention", lambda q, k, v, *_: torch.ones_like(v)):
        straight, crossed = model(**inputs), model(**swapped)
    assert relative_error(crossed.flip(0), straight) <= 1e-5, "gates of one sample act on another"


def reason_of(error: SaladError) -> str:
    """The first line that tells, of what was refused."""
    text = " ".join(str(error).split())
    assert len(text) > 20, "a refusal without a reason"
    mark = text.partition(" no ")[2]
    return f"{type(error).__name__}: {(mark or text)[:110]}"


def main() -> int:
    """Print what became of `--count` models; 1 if one was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--compiled", type=int, default=10, help="compile one of so many")
    options = parser.parse_args()
    outcomes: collections.Counter[str] = collections.Counter()
    for seed in range(options.first, options.first + options.count):
        style = style_of(seed)
        try:
            said = check(style, compiled=seed % options.compiled == 0)
        except Exception as error:
            said = "WRONG"
            where = traceback.extract_tb(error.__traceback__)[-1]
            print(f"seed {seed}: {type(error).__name__}: {str(error)[:300]} ({where.name})\n  {style}", flush=True)
        outcomes[said] += 1
    for said, count in outcomes.most_common():
        print(f"{count:4d}  {said}")
    return int(outcomes["WRONG"] > 0)


if __name__ == "__main__":
    raise SystemExit(main())
