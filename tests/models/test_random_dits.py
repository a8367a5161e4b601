"""Random small DiTs: whatever a model combines, the three invariants hold."""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass
from unittest import mock

import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import Phase, event, given, settings
from hypothesis import strategies as st
from torch import Tensor

import salad_compile
from salad_compile.definition import linear_branch
from salad_compile.kernels import measure_executions
from salad_compile.sites.branch import branches
from tests.support import TINY, Recorder, assert_same, randomise_branches, relative_error, run, seeded

HEAD_DIM, WIDTH, LAYERS = 8, 20, 2


@dataclass(frozen=True)
class Style:
    """What is drawn.

    layout: of query, key and value while they are normed and rotated. per_block: compiled block by block.
    """

    layout: str
    fused: bool
    norm: str
    rope: str
    text: str
    dual: bool
    masked: bool
    grouped: bool
    grid: tuple[int, int, int]
    text_tokens: int
    batch: int
    per_block: bool
    seed: int

    @property
    def heads(self) -> tuple[int, int]:
        """Of queries, and of keys and values."""
        return (4, 2) if self.grouped else (3, 3)

    @property
    def text_count(self) -> int:
        return 0 if self.text == "none" else self.text_tokens


EDGES = itertools.product(range(1, 10), range(3, 13), range(3, 13))
GRIDS = st.sampled_from([grid for grid in EDGES if 100 <= math.prod(grid) <= 220])
STYLES = st.builds(
    Style,
    layout=st.sampled_from(["BHSD", "BSHD"]),
    fused=st.booleans(),
    norm=st.sampled_from(["none", "rms", "layer"]),
    rope=st.sampled_from(["none", "in place", "stack", "complex"]),
    text=st.sampled_from(["none", "before", "after"]),
    dual=st.booleans(),
    masked=st.booleans(),
    grouped=st.booleans(),
    grid=GRIDS,
    text_tokens=st.integers(1, 40),
    batch=st.integers(1, 2),
    per_block=st.sampled_from([True, True, False]),  # half as long: one graph serves all blocks
    seed=st.integers(0, 99),
)


class Projections(nn.Module):
    """query, key, value and out of one stream."""

    def __init__(self, style: Style) -> None:
        super().__init__()
        heads, shared = style.heads
        self.widths = [count * HEAD_DIM for count in (heads, shared, shared)]
        if style.fused:
            self.qkv = nn.Linear(WIDTH, sum(self.widths))
        else:
            self.q, self.k, self.v = (nn.Linear(WIDTH, width, bias=style.norm == "none") for width in self.widths)
        self.out = nn.Linear(heads * HEAD_DIM, WIDTH)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, S, H, D) each."""
        parts = self.qkv(x).split(self.widths, dim=-1) if hasattr(self, "qkv") else (self.q(x), self.k(x), self.v(x))
        return [part.unflatten(-1, (-1, HEAD_DIM)) for part in parts]


class Attention(nn.Module):
    """One or two streams, joined in the order of the style."""

    def __init__(self, style: Style) -> None:
        super().__init__()
        self.style = style
        self.video = Projections(style)
        self.text = Projections(style) if style.dual and style.text != "none" else None
        norms = {"none": nn.Identity, "rms": nn.RMSNorm, "layer": nn.LayerNorm}
        arguments = () if style.norm == "none" else (HEAD_DIM,)
        self.query_norm, self.key_norm = (norms[style.norm](*arguments) for _ in range(2))

    def forward(self, x: Tensor, text: Tensor | None, mask: Tensor | None) -> list[Tensor]:
        """Streams in, streams out."""
        streams, projections = [x], [self.video]
        if self.text is not None:
            assert text is not None
            streams, projections = [x, text], [self.video, self.text]
            if self.style.text == "before":
                streams, projections = streams[::-1], projections[::-1]
        parts = [projection(stream) for projection, stream in zip(projections, streams, strict=True)]
        inner = self.style.layout == "BHSD"
        axis = 2 if inner else 1
        operands = []
        for part in zip(*parts, strict=True):
            joined = [p.transpose(1, 2) if inner else p for p in part]
            operands.append(torch.cat(joined, axis) if len(joined) > 1 else joined[0])
        query, key, value = operands
        query, key = (
            rotate(norm(t), axis, self.style.rope) for norm, t in ((self.query_norm, query), (self.key_norm, key))
        )
        if not inner:
            query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=self.style.grouped)
        out = out.transpose(1, 2).flatten(2)
        answers = out.split([stream.shape[1] for stream in streams], dim=1) if len(streams) > 1 else [out]
        results = [projection.out(answer) for projection, answer in zip(projections, answers, strict=True)]
        return results if self.style.text != "before" or len(results) == 1 else results[::-1]


def rotate(x: Tensor, axis: int, style: str) -> Tensor:
    """Rotary positions along `axis`, in the ways in which models write it."""
    if style == "none":
        return x
    frequencies = 0.3 ** torch.arange(HEAD_DIM // 2, device=x.device, dtype=x.dtype)
    angle = torch.arange(x.shape[axis], device=x.device, dtype=x.dtype)[:, None] * frequencies
    angle = angle if axis == 2 else angle[:, None]
    even, odd = x[..., 0::2], x[..., 1::2]
    if style == "in place":
        out = torch.empty_like(x)
        out[..., 0::2] = even * angle.cos() - odd * angle.sin()
        out[..., 1::2] = even * angle.sin() + odd * angle.cos()
        return out.type_as(x)
    if style == "stack":
        turned = torch.stack([-odd, even], dim=-1).flatten(-2)
        doubled = angle.repeat_interleave(2, dim=-1)
        return x * doubled.cos() + turned * doubled.sin()
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2).type_as(x)


class Block(nn.Module):
    """Residual attention and a residual MLP for each stream."""

    def __init__(self, style: Style) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention(style)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor, text: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        dual = self.attention.text is not None
        answers = self.attention(self.norm(x), self.norm(text) if dual and text is not None else None, mask)
        x = x + answers[0]
        if dual:
            assert text is not None
            text = text + answers[1]
        return x + self.mlp(self.norm2(x)), text


class RandomDiT(nn.Module):
    """Latents (B, 3, T, H, W), text (B, L, WIDTH) and the valid tokens (B, S) of the joint sequence -> tokens."""

    def __init__(self, style: Style) -> None:
        super().__init__()
        self.style = style
        self.patch = nn.Conv3d(3, WIDTH, 1)
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block(style) for _ in range(LAYERS))

    def forward(self, latents: Tensor, text: Tensor, valid: Tensor) -> Tensor:
        style = self.style
        x, stream = self.patch(latents).flatten(2).transpose(1, 2), self.embed(text)
        mask = valid[:, None, None, :] if style.masked else None
        single = style.text != "none" and not style.dual
        if style.text == "none":
            x = x + stream.mean(1, keepdim=True)
        elif single:
            x = torch.cat([stream, x] if style.text == "before" else [x, stream], dim=1)
        current: Tensor | None = stream if style.dual and style.text != "none" else None
        for block in self.blocks:
            x, current = block(x, current, mask)
        if current is None:
            return x
        return torch.cat([current, x] if style.text == "before" else [x, current], dim=1)


def inputs_of(style: Style) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(style.seed)
    tokens = math.prod(style.grid) + style.text_count
    valid = torch.ones(style.batch, tokens, dtype=torch.bool)
    if style.text == "before" and style.text_tokens > 1:
        valid[0, : style.text_tokens // 2] = False
    else:
        valid[0, tokens - max(style.text_tokens // 2, 1) :] = False
    return {
        "latents": torch.randn(style.batch, 3, *style.grid, generator=generator) * 2,
        "text": torch.randn(style.batch, style.text_tokens, WIDTH, generator=generator) * 2,
        "valid": valid,
    }


def build(style: Style) -> RandomDiT:
    with seeded(style.seed):
        return RandomDiT(style)


def converted(style: Style, **changes: object) -> RandomDiT:
    config = dataclasses.replace(TINY, **changes)  # type: ignore[arg-type]
    model: RandomDiT = salad_compile.convert(build(style), config, example_inputs=inputs_of(style))
    return model


def valid_rows(style: Style, out: Tensor) -> Tensor:
    """Nobody reads the others; attention that sees nothing of them may answer anything there."""
    return out[inputs_of(style)["valid"]] if style.masked else out


def check_discovery(style: Style, model: RandomDiT) -> None:
    records = [branch.record for branch in branches(model).values()]
    assert [record.owner for record in records] == [f"blocks.{i}.attention" for i in range(LAYERS)]
    for record in records:
        assert (record.text, record.text_tokens) == (style.text, style.text_count)
        assert record.tokens == math.prod(style.grid) + style.text_count
        assert (record.heads, record.key_heads) == style.heads
        assert (record.text_query is not None) == (style.text != "none" and style.dual)
        assert record.on_grid


def check_sparsity_zero(style: Style, dense: Tensor) -> None:
    salad = run(converted(style, sparsity=0.0), inputs_of(style), gradients=False).output
    assert salad.isfinite().all()
    assert relative_error(valid_rows(style, salad), valid_rows(style, dense)) <= 1e-5


def check_zero_projection(style: Style, model: RandomDiT, dense: Tensor) -> None:
    inputs = inputs_of(style)
    salad = run(model, inputs, gradients=False).output
    with mock.patch.object(linear_branch, "linear_attention", _nothing):
        sparse = run(model, inputs, gradients=False).output
    assert relative_error(salad, sparse) <= 1e-5
    assert relative_error(sparse, dense) > 1e-4, "nothing is sparse: the test is vacuous"


def _nothing(query: Tensor, key: Tensor, value: Tensor, *arguments: object) -> Tensor:
    return torch.zeros_like(value)


def check_compiled(style: Style, model: RandomDiT) -> None:
    (inputs, others), features = (inputs_of(style) for _ in range(2)), ("latents", "text")
    for each in (inputs, others):
        for name in features:  # so that all blocks see inputs of one kind: the base is frozen
            each[name].requires_grad_()
    randomise_branches(model)
    expected = run(model, inputs)
    trained = {name for name, _ in model.named_parameters() if ".salad." in name}
    assert expected.gradients.keys() == trained
    recorder = Recorder()
    torch._dynamo.reset()
    compiled = model if style.per_block else torch.compile(model, backend=recorder, fullgraph=True)
    if style.per_block:
        for block in model.blocks:
            block.compile(backend=recorder, fullgraph=True)
    with measure_executions() as executions:
        actual = run(compiled, others, parameters=model)
    for name in features:
        expected.gradients[name], actual.gradients[name] = inputs[name].grad, others[name].grad
    assert_same(actual, expected)
    assert len(executions) == len(branches(model)) == LAYERS
    assert recorder.graphs == 1
    assert recorder.after["salad.block_sparse_attention"] == (1 if style.per_block else LAYERS)
    assert recorder.after["salad.tag"] == recorder.after["salad.site"] == 0


@settings(deadline=None, derandomize=True, database=None, phases=[Phase.generate])
@given(style=STYLES)
def test_invariants(style: Style) -> None:
    streams = "no text" if style.text == "none" else f"text {style.text}, {'dual' if style.dual else 'single'} stream"
    event(f"{streams}{', masked' if style.masked else ''}{', grouped' if style.grouped else ''}")
    dense = run(build(style), inputs_of(style), gradients=False).output
    check_sparsity_zero(style, dense)
    model = converted(style)
    check_discovery(style, model)
    check_zero_projection(style, model, dense)
    check_compiled(style, model)
