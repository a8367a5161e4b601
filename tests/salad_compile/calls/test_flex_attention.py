"""flex_attention: what modes get to see, and which calls stay dense."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor, fx
from torch.nn.attention import flex_attention as flex_module
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

import salad_compile
from salad_compile.calls.flex_attention import real_flex_attention, seen_by_modes, stand_in
from salad_compile.config import BackendOptions
from salad_compile.passes.attention_call import LEFT_DENSE, TRAINING_FREE
from salad_compile.passes.find_attention import find_attention
from tests.support import TINY

Attend = Callable[[Tensor, Tensor, Tensor], Any]
TOKENS = 128


class Attention(nn.Module):
    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend = attend
        key_heads = 1 if attend is PLAIN["grouped"] else 2
        self.q, self.k, self.v = (nn.Linear(32, 16 * heads) for heads in (2, key_heads, key_heads))

    def forward(self, x: Tensor) -> Tensor:
        heads = (linear(x).unflatten(-1, (-1, 16)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        out = self.attend(*heads)
        return (out if isinstance(out, Tensor) else out[0]).transpose(1, 2).flatten(2)


def diagonal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q - k).abs() < 40


MASK = create_block_mask(diagonal, None, None, TOKENS, TOKENS, device="cpu")
PLAIN: dict[str, Attend] = {
    "plain": flex_attention,
    "scaled": lambda q, k, v: flex_attention(q, k, v, scale=0.4),
    "grouped": lambda q, k, v: flex_attention(q, k, v, enable_gqa=True),
    "lse": lambda q, k, v: flex_attention(q, k, v, return_lse=True),
    "compiled": torch.compile(flex_attention, backend="eager"),
}
DENSE: dict[str, tuple[Attend, str]] = {
    "mask": (lambda q, k, v: flex_attention(q, k, v, block_mask=MASK), "it has a block mask of its own"),
    "score_mod": (
        lambda q, k, v: flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s + (i - j).abs()),
        "it has a score_mod of its own",
    ),
}


def x() -> Tensor:
    return torch.randn(1, TOKENS, 32, generator=torch.Generator().manual_seed(0))


def in_graph(attend: Attend) -> list[tuple[str, str]]:
    found = []

    def backend(gm: fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., object]:
        found.extend((c.status, c.reason) for c in find_attention(gm.graph, BackendOptions(min_tokens=64)))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(Attention(attend).requires_grad_(False), backend=backend, fullgraph=True)(x())
    return found


def test_what_of_torch_this_rests_on() -> None:
    assert flex_attention.__code__.co_freevars == ()
    assert flex_module._identity is not None
    assert flex_module._LARGE_SPARSE_BLOCK_SIZE > 2**20
    empty = flex_module._create_empty_block_mask(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8))
    assert isinstance(empty, BlockMask)
    assert set(empty.BLOCK_SIZE) == {flex_module._LARGE_SPARSE_BLOCK_SIZE}
    assert empty.mask_mod is flex_module.noop_mask


@pytest.mark.parametrize("attend", PLAIN.values(), ids=PLAIN.keys())
def test_without_a_mask_it_is_found(attend: Attend) -> None:
    plan = salad_compile.plan(Attention(attend), (x(),), config=TINY)
    (site,) = plan.sites[""]
    assert site.eligible, site.reason
    assert in_graph(attend) == [(TRAINING_FREE, "")]


@pytest.mark.parametrize(("attend", "reason"), DENSE.values(), ids=DENSE.keys())
def test_what_stays_dense_says_why(attend: Attend, reason: str) -> None:
    plan = salad_compile.plan(Attention(attend), (x(),), config=TINY)
    assert [site.reason for site in plan.sites[""]] == [reason]
    assert in_graph(attend) == [(LEFT_DENSE, reason)]


@pytest.mark.parametrize("name", ["plain", "scaled", "lse"])
def test_sparsity_zero_is_flex_attention(name: str) -> None:
    model = Attention(PLAIN[name]).requires_grad_(False)
    expected = model(x())
    config = salad_compile.SaladConfig(compensation="none", sparsity=0.0, query_block=32, key_block=32, min_tokens=90)
    converted = salad_compile.convert(copy.deepcopy(model), config, example_inputs=(x(),))
    torch.testing.assert_close(converted(x()), expected, atol=1e-5, rtol=1e-4)
    torch._dynamo.reset()
    compiled = torch.compile(converted, backend="salad", options={"lowering": "aot_eager"})
    with torch.no_grad():
        torch.testing.assert_close(compiled(x()), expected, atol=1e-5, rtol=1e-4)


def test_a_log_sum_exp_that_is_read_keeps_the_call_dense() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = flex_attention(q, k, v, return_lse=True)
        return out * lse.unsqueeze(-1)

    assert in_graph(attend) == [(LEFT_DENSE, "other results of the call than the attention are read")]


def test_other_calls_of_a_converted_owner_are_the_real_ones() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v) + flex_attention(q, k, v, block_mask=MASK)

    model = Attention(attend).requires_grad_(False)
    expected = model(x())
    config = salad_compile.SaladConfig(compensation="none", sparsity=0.0, query_block=32, key_block=32, min_tokens=90)
    converted = salad_compile.convert(model, config, example_inputs=(x(),))
    with torch.no_grad():  # on the CPU the real one refuses tensors that require gradients
        torch.testing.assert_close(converted(x()), expected, atol=1e-5, rtol=1e-4)


def test_the_function_is_put_back() -> None:
    code = flex_attention.__code__
    with seen_by_modes(stand_in):
        with pytest.raises(RuntimeError, match="inside"):
            _raise_inside()
        assert flex_attention.__code__ is not code  # the outer one still needs it
    assert flex_attention.__code__ is code
    assert real_flex_attention.__code__ is code


def _raise_inside() -> None:
    with seen_by_modes(real_flex_attention):
        raise RuntimeError("inside")
