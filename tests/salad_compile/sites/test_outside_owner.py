"""Sites whose projection or call runs another time, or elsewhere, than once in their owner's forward."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import salad_compile
from salad_compile.errors import SiteLostError
from salad_compile.sites.outside_owner import saving
from tests import toys
from tests.support import randomise_branches, relative_error

CONFIG = salad_compile.SaladConfig(
    compensation="none",
    sparsity=0.6,
    query_block=16,
    key_block=16,
    lora_rank=2,
    min_tokens=64,
    rope_placement="rotate-then-map",
)
INPUTS = (toys.tokens(96),)
OPTIONS = {"lowering": "eager"}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(toys.WIDTH, toys.WIDTH) for _ in range(4))
        self.k2, self.v2 = nn.Linear(toys.WIDTH, toys.WIDTH), nn.Linear(toys.WIDTH, toys.WIDTH)
        self.way = ""

    def heads(self, *projected: Tensor) -> list[Tensor]:
        return [x.unflatten(-1, (2, -1)).transpose(1, 2) for x in projected]

    def inside(self, x: Tensor, attend: Callable[..., Tensor] = F.scaled_dot_product_attention) -> Tensor:
        q, k, v = self.heads(self.q(x), self.k(x), self.v(x))
        out = attend(q, k, v)
        if self.way == "two calls":
            out = out + attend(q, *self.heads(self.k2(x.flip(1)), self.v2(x.flip(1))))
        if self.way == "two runs":
            out = out + attend(*self.heads(self.q(x.flip(1)), self.k(x), self.v(x)))
        result: Tensor = self.o(out.transpose(1, 2).flatten(2))
        return result

    def forward(self, x: Tensor) -> Tensor:
        if self.way.startswith("call"):
            reentrant = self.way.endswith("reentrant")
            return self.inside(
                x, lambda *qkv: checkpoint(F.scaled_dot_product_attention, *qkv, use_reentrant=reentrant)
            )
        if self.way.startswith("forward"):
            return checkpoint(self.inside, x, use_reentrant=self.way.endswith("reentrant"))
        return self.inside(x)


def converted(way: str = "", grid: Any = None) -> nn.Module:
    torch.manual_seed(0)
    model = toys.Stack(Attention())
    if way == "two calls":
        model.layers[0].way = way
    salad_compile.convert(model, CONFIG, example_inputs=INPUTS, grid=grid)
    randomise_branches(model)
    model.layers[0].way = way
    return model


def lost(call: Callable[[], Any], match: str) -> None:
    with pytest.raises(Exception, match=match) as caught:
        call()
    assert isinstance(getattr(caught.value, "inner_exception", caught.value), SiteLostError)


@pytest.mark.parametrize("way", ["call", "call, reentrant", "forward", "forward, reentrant"])
def test_a_checkpoint_inside_an_owner_is_an_error(way: str) -> None:
    model = converted(way)
    x = INPUTS[0].clone().requires_grad_()
    lost(lambda: model(x).sum().backward(), "Checkpoint the whole attention module|without gradients")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="salad", options={"lowering": "aot_eager"})
    lost(lambda: compiled(x).sum().backward(), "would run dense|SiteLostError")


def test_two_calls_of_one_query_compiled_and_not() -> None:
    model = converted("two calls")
    compiled = torch.compile(model, backend="salad", options=OPTIONS)
    assert relative_error(compiled(*INPUTS), model(*INPUTS)) < 1e-5


def test_a_projection_that_runs_twice_is_an_error() -> None:
    model = converted("two runs")
    lost(lambda: model(*INPUTS), "ran twice")
    lost(lambda: torch.compile(model, backend="salad", options=OPTIONS)(*INPUTS), "ran twice")


def test_an_owner_whose_forward_is_replaced_is_an_error() -> None:
    model = converted(grid=(4, 4, 6))
    owner = model.layers[0]
    owner.forward = types.MethodType(Attention.forward, owner)
    lost(lambda: model(*INPUTS), "outside of its module's forward")


def test_a_converted_model_is_planned_again() -> None:
    model = converted(grid=(4, 4, 6))
    assert salad_compile.plan(model, INPUTS, config=CONFIG).eligible
    model(*INPUTS)


def test_who_saves_tensors_is_known() -> None:
    assert saving() is None
    with torch.autograd.graph.save_on_cpu():
        assert len(saving()) == 2
    assert saving() is None
    seen: list[Any] = []
    checkpoint(lambda x: seen.append(saving()), torch.ones(1, requires_grad=True), use_reentrant=False)
    assert seen[0][0].__qualname__.startswith("_checkpoint_hook")
