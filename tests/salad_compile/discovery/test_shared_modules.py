"""Projections that run twice, or belong to two modules: right, or refused by plan with the reason."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import salad_compile
from salad_compile.errors import NoEligibleSiteError
from tests import toys
from tests.support import TINY, check_rewrite, randomise_branches


def attend(module: toys.SelfAttention, q: Tensor, x: Tensor) -> Tensor:
    key, value = toys.heads(module.k(x)), toys.heads(module.v(x))
    out: Tensor = F.scaled_dot_product_attention(q, key, value)
    return out


def joined(module: toys.SelfAttention, *results: Tensor) -> Tensor:
    result: Tensor = module.o(sum(results, start=results[0] * 0).transpose(1, 2).flatten(2))
    return result


class TwoRuns(toys.SelfAttention):
    """All projections run on two inputs, both before the calls."""

    def forward(self, x: Tensor) -> Tensor:
        other = x.flip(1)
        first, second = toys.heads(self.q(x)), toys.heads(self.q(other))
        return joined(self, attend(self, first, x), attend(self, second, other))


class AdapterAfter(toys.SelfAttention):
    """One query, for self-attention and then for other keys."""

    def forward(self, x: Tensor) -> Tensor:
        q = toys.heads(self.q(x))
        return joined(self, attend(self, q, x), attend(self, q, x.flip(1) * 1.5))


class AdapterBefore(toys.SelfAttention):
    """The same, the other keys first."""

    def forward(self, x: Tensor) -> Tensor:
        q = toys.heads(self.q(x))
        return joined(self, attend(self, q, x.flip(1) * 1.5), attend(self, q, x))


class Outside(nn.Module):
    """Reads the query projection of its attention by itself, too."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = toys.SelfAttention()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.attention(x) + self.attention.q(x)
        return result


class Parts(toys.SelfAttention):
    """Attends with a part of the query, key and value after another: heads, or halves of the tokens."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (toys.heads(p(x)).chunk(2, dim=self.axis) for p in (self.q, self.k, self.v))
        parts = [toys.positional(*operands) for operands in zip(q, k, v, strict=True)]
        result: Tensor = self.o(torch.cat(parts, dim=self.axis).transpose(1, 2).flatten(2))
        return result


class Bottleneck(toys.SelfAttention):
    """Keys are projected from what another layer makes of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(toys.WIDTH, toys.WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out = toys.positional(toys.heads(self.q(x)), toys.heads(self.k(self.down(x))), toys.heads(self.v(x)))
        result: Tensor = self.o(out.transpose(1, 2).flatten(2))
        return result


IN_PARTS = "2 attention calls of one forward read its query and key, heads or tokens in parts"
NOT_OF_ONE = "its query, key and value are not projections of one value"


def two_with_one_key() -> nn.Module:
    first, second = toys.SelfAttention(), toys.SelfAttention()
    second.k = first.k
    return toys.Stack(first, second)


@pytest.mark.parametrize(
    ("model", "reasons"),
    [
        (TwoRuns(), ["runs 2 times in one forward", "runs 2 times in one forward"]),
        (AdapterAfter(), ["", NOT_OF_ONE]),
        (AdapterBefore(), [NOT_OF_ONE, "another attention call reads its query before it does"]),
        (Parts(1), [IN_PARTS]),
        (Parts(2), ["the query projection sees (2, 100) tokens, the attention (2, 50)"]),
        (Bottleneck(), [NOT_OF_ONE]),
        (Outside(), ["also runs outside of 'attention'"]),
        (two_with_one_key(), ["is also one of", "is also one of"]),
    ],
    ids=lambda given: type(given).__name__,
)
def test_plan_says_which_cannot_be_told_apart(model: nn.Module, reasons: list[str]) -> None:
    plan = salad_compile.plan(model, (toys.tokens(100),), config=TINY)
    sites = plan.sites[""]
    assert len(sites) == len(reasons)
    for site, reason in zip(sites, reasons, strict=True):
        assert reason in site.reason
        assert site.eligible == (not reason)
    if not plan.eligible:
        with pytest.raises(NoEligibleSiteError):
            salad_compile.convert(model, TINY, example_inputs=(toys.tokens(100),))


def test_a_query_that_attends_to_other_keys_afterwards_is_salad_once() -> None:
    model = salad_compile.convert(AdapterAfter(), TINY, example_inputs=(toys.tokens(100),))
    randomise_branches(model)
    check_rewrite(model, {"x": toys.tokens(100)}, sites=1)
