"""Packed samples of several lengths: refused by plan where they can be seen, and by every run."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
from torch import Tensor

import salad_compile
from salad_compile.errors import SiteLostError
from tests.models.attention_styles import varlen_attention
from tests.support import randomise_branches, relative_error

CONFIG = {"compensation": "none", "min_tokens": 64, "sparsity": 0.0, "query_block": 16, "key_block": 16}
AOT = {"lowering": "aot_eager"}
UNEQUAL = {"two lengths": [0, 130, 200], "padding as a sample": [0, 200, 200], "padding outside": [0, 90, 180]}


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        q, k, v = (linear(x).unflatten(-1, (2, 8)) for linear in (self.q, self.k, self.v))
        out: Tensor = self.o(varlen_attention(q, k, v, ends, 0.3).flatten(1))
        return out


def inputs(ends: list[int]) -> tuple[Tensor, Tensor]:
    x = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    return x, torch.tensor(ends, dtype=torch.int32)


def model() -> nn.Module:
    torch.manual_seed(0)
    return Packed()


@pytest.mark.parametrize("ends", UNEQUAL.values(), ids=UNEQUAL)
def test_plan_refuses(ends: list[int]) -> None:
    plan = salad_compile.plan(
        model(), inputs(ends), config=salad_compile.SaladConfig(compensation="none", min_tokens=64)
    )
    assert [site.eligible for site in plan.sites[""]] == [False]
    assert "different lengths" in plan.sites[""][0].reason


@pytest.mark.parametrize("compiled", [False, True])
@torch.no_grad()
def test_every_run_of_a_converted_model_looks(compiled: bool) -> None:
    torch._dynamo.reset()
    converted = salad_compile.convert(model(), CONFIG, example_inputs=inputs([0, 100, 200]))
    randomise_branches(converted)
    right = converted(*inputs([0, 100, 200]))
    call = torch.compile(converted, backend="salad", options=AOT) if compiled else converted
    for ends in UNEQUAL.values():
        with pytest.raises(SiteLostError, match="different lengths"):
            call(*inputs(ends))
        assert relative_error(call(*inputs([0, 100, 200])), right) < 1e-6


@torch.no_grad()
def test_so_does_a_model_that_was_never_converted() -> None:
    torch._dynamo.reset()
    dense = model()
    compiled = torch.compile(dense, backend="salad", options={**CONFIG, **AOT})
    equal = inputs([0, 100, 200])
    assert relative_error(compiled(*equal), dense(*equal)) < 1e-6
    for ends in UNEQUAL.values():
        with pytest.raises(SiteLostError, match="different lengths"):
            compiled(*inputs(ends))


def test_gradients_pass_the_operator() -> None:
    query = torch.randn(4, 2, 3, requires_grad=True)
    ends = torch.tensor([0, 2, 4])
    torch.library.opcheck(torch.ops.salad.require_equal_samples.default, (query, ends, None, 4))
