"""Attention computed by hand: the ways to write it that are recognised, uncompiled and in graphs, and the others."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor, fx

import salad_compile
from salad_compile.config import BackendOptions
from salad_compile.passes.attention_call import LEFT_DENSE, TRAINING_FREE, AttentionCall
from salad_compile.passes.find_attention import find_attention
from tests.support import TINY, Recorder, assert_same, randomise_branches, run

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
HEADS, WIDTH, TOKENS = 2, 8, 100


class Attention(nn.Module):
    """`attend` gets (B, H, S, D), or (B, S, H, D), and answers likewise."""

    def __init__(self, attend: Attend, *, heads_first: bool = True) -> None:
        super().__init__()
        self.attend, self.heads_first = attend, heads_first
        self.q, self.k, self.v, self.o = (nn.Linear(HEADS * WIDTH, HEADS * WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        heads = [linear(x).unflatten(-1, (HEADS, WIDTH)) for linear in (self.q, self.k, self.v)]
        if not self.heads_first:
            return self.o(self.attend(*heads).flatten(2))
        return self.o(self.attend(*(tensor.transpose(1, 2) for tensor in heads)).transpose(1, 2).flatten(2))


def at_and_method(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.transpose(-2, -1)) * 0.25).softmax(dim=-1) @ v


def divided(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.mT).div(math.sqrt(WIDTH))
    return torch.matmul(torch.softmax(scores, -1), v)


def scaled_before(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.softmax((q * 0.5) @ (k * 0.5).permute(0, 1, 3, 2), dim=-1) @ v


def names_of_numpy(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * 0.25).softmax(axis=-1) @ v


def in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(2, 3)
    scores *= 0.25
    scores.div_(2.0)
    return scores.softmax(3).matmul(v)


def casts(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q.float() @ k.float().transpose(-1, -2) / 3).softmax(-1, dtype=torch.float64)
    return F.dropout(weights.to(v.dtype), 0.0).contiguous() @ v


def negative_left(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (0.25 * (q @ k.transpose(-2, -1))).softmax(-1) @ v


def batched(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    flat = [tensor.reshape(-1, *tensor.shape[2:]) for tensor in (q, k, v)]
    weights = torch.bmm(flat[0], flat[1].transpose(1, 2)).mul(0.3).softmax(-1)
    return torch.bmm(weights, flat[2]).view(q.shape)


def accumulated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    flat = [tensor.reshape(-1, *tensor.shape[2:]) for tensor in (q, k, v)]
    empty = q.new_empty(flat[0].shape[0], q.shape[2], k.shape[2])
    weights = torch.baddbmm(empty, flat[0], flat[1].transpose(1, 2), beta=0, alpha=0.3).softmax(-1)
    return torch.bmm(weights, flat[2]).view(q.shape)


def einsum_heads_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("b h i j, b h j d -> b h i d", torch.einsum("bhid,bhjd->bhij", q, k).mul(0.2).softmax(-1), v)


def einsum_then_matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhid,bhjd->bhij", q, k).mul(0.2).softmax(-1) @ v


def einsum_heads_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhqk,bkhd->bqhd", torch.einsum("bqhd,bkhd->bhqk", q, k).mul(0.2).softmax(-1), v)


def einsum_of_lists(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum(q, [0, 1, 2, 3], k, [0, 1, 4, 3], [0, 1, 2, 4]).mul(0.2).softmax(-1)
    return torch.einsum(weights, [0, 1, 2, 4], v, [0, 1, 4, 3], [0, 1, 2, 3])


def einsum_odd(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("nqhk,nkhd->nqhd", torch.einsum("nqhd,nkhd->nqhk", q * 0.4, k).softmax(-1), v)


# name -> (function, scale, whether heads come first)
FORMS: dict[str, tuple[Attend, float, bool]] = {
    "at and method": (at_and_method, 0.25, True),
    "divided": (divided, 1 / math.sqrt(WIDTH), True),
    "scaled before": (scaled_before, 1.0, True),
    "names of numpy": (names_of_numpy, 0.25, True),
    "in place": (in_place, 0.125, True),
    "casts": (casts, 1 / 3, True),
    "number left": (negative_left, 0.25, True),
    "bmm": (batched, 0.3, True),
    "baddbmm": (accumulated, 0.3, True),
    "einsum": (einsum_heads_first, 0.2, True),
    "einsum, matmul": (einsum_then_matmul, 0.2, True),
    "einsum, heads last": (einsum_heads_last, 0.2, False),
    "einsum of lists": (einsum_of_lists, 0.2, True),
    "einsum, odd scores": (einsum_odd, 1.0, False),
}
every_form = pytest.mark.parametrize(("attend", "scale", "heads_first"), FORMS.values(), ids=FORMS.keys())


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.full((q.shape[2], k.shape[2]), float("-inf")).triu(1)
    return (q @ k.transpose(-2, -1) + mask).softmax(-1) @ v


def filled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1)
    return scores.masked_fill(scores > 2, -1e9).softmax(-1) @ v


def filled_in_part(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1)
    scores[..., :7].fill_(-1e9)
    return scores.softmax(-1) @ v


def set_in_part(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1)
    scores[..., :7] = -1e9
    return scores.softmax(-1) @ v


def clipped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1)).clamp(-3, 3).softmax(-1) @ v


def reweighted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.transpose(-2, -1)).softmax(-1)
    return (weights * torch.linspace(0, 1, k.shape[2])) @ v


def reweighted_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.transpose(-2, -1)).softmax(-1)
    weights.mul_(torch.linspace(0, 1, k.shape[2]))
    return weights @ v


def reweighted_in_part(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.transpose(-2, -1)).softmax(-1)
    weights[..., :7].mul_(0.5)
    return weights @ v


def number_by_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (2.0 / (q @ k.transpose(-2, -1))).softmax(-1) @ v


def learned_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) * torch.tensor(0.3)).softmax(-1) @ v


CHANGED = (
    masked,
    filled,
    filled_in_part,
    set_in_part,
    clipped,
    reweighted,
    reweighted_in_place,
    reweighted_in_part,
    learned_scale,
    number_by_scores,
)


def softmax_over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1)).softmax(-2) @ v


def no_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1)) @ v


def other_way_round(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return v.transpose(-2, -1) @ (q @ k.transpose(-2, -1)).softmax(-1)


def x(batch: int = 1) -> Tensor:
    return torch.randn(batch, TOKENS, HEADS * WIDTH, generator=torch.Generator().manual_seed(0))


def in_graph(model: nn.Module) -> list[AttentionCall]:
    found: list[AttentionCall] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., object]:
        found.extend(find_attention(gm.graph, BackendOptions(min_tokens=64)))
        gm.graph.lint()
        return gm.forward

    torch._dynamo.reset()
    torch.compile(model, backend=backend, fullgraph=True)(x())
    return found


@every_form
def test_found_uncompiled_and_in_graphs(attend: Attend, scale: float, heads_first: bool) -> None:
    model = Attention(attend, heads_first=heads_first)
    (site,) = salad_compile.plan(model, (x(),), config=TINY).sites[""]
    assert site.eligible, site.reason
    assert (site.heads, site.query_tokens, site.head_dim) == (HEADS, TOKENS, WIDTH)
    (call,) = in_graph(model)
    assert (call.status, call.reason) == (TRAINING_FREE, "")
    assert call.scale == pytest.approx(scale)


@every_form
def test_sparsity_zero_is_dense(attend: Attend, scale: float, heads_first: bool) -> None:
    model = Attention(attend, heads_first=heads_first)
    expected = model(x())
    config = salad_compile.SaladConfig(compensation="none", sparsity=0.0, query_block=32, key_block=16, min_tokens=90)
    converted = salad_compile.convert(model, config, example_inputs=(x(),))
    torch.testing.assert_close(converted(x()), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["at and method", "in place", "einsum, heads last"])
def test_eager_equals_compiled(name: str) -> None:
    attend, _, heads_first = FORMS[name]
    batch = x(2).requires_grad_()
    model = salad_compile.convert(Attention(attend, heads_first=heads_first), TINY, example_inputs=(batch,))
    randomise_branches(model)
    expected = run(model, {"x": batch})
    recorder = Recorder()
    compiled = torch.compile(model, backend=recorder, fullgraph=True)
    assert_same(run(compiled, {"x": batch}, parameters=model), expected)
    assert recorder.after["salad.block_sparse_attention"] == 1


@pytest.mark.parametrize("attend", CHANGED)
def test_changed_scores_stay_dense_and_say_why(attend: Attend) -> None:
    model = Attention(attend)
    (site,) = salad_compile.plan(model, (x(),), config=TINY).sites[""]
    assert not site.eligible
    assert "its scores go through" in site.reason
    (call,) = in_graph(model)
    assert call.status == LEFT_DENSE
    assert "its scores go through" in call.reason


@pytest.mark.parametrize("attend", [softmax_over_queries, no_softmax])
def test_what_is_no_attention(attend: Attend) -> None:
    model = Attention(attend)
    assert not salad_compile.plan(model, (x(),), config=TINY).sites[""]
    assert not in_graph(model)


def test_batch_and_heads_in_one_axis_stay_dense() -> None:
    (site,) = salad_compile.plan(Attention(batched), (x(2),), config=TINY).sites[""]
    assert site.reason == "batch and heads are one axis of its products"


def test_a_product_on_the_left_is_no_attention() -> None:
    q = torch.randn(1, 2, 100, 8)
    model = Attention(lambda q, k, v: other_way_round(q, k, v).transpose(-2, -1))
    assert q.shape == model.attend(q, q, q).shape
    assert not salad_compile.plan(model, (x(),), config=TINY).sites[""]
