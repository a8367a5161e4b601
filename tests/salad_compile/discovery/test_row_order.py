"""The gate belongs to its own token and sample, whatever lies between the projection and the call; or it is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import salad_compile
from salad_compile import SaladConfig
from salad_compile.discovery.discover import AttentionSite, discover
from salad_compile.errors import SiteLostError
from salad_compile.sites.branch import branches
from tests import toys

CONFIG = SaladConfig(compensation="none", sparsity=0.0, query_block=16, key_block=16, lora_rank=0, min_tokens=40)
FRAMES, TOKENS = 4, 72
ORDER = torch.arange(TOKENS).flip(0)
Operand = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]


class Layout(toys.SelfAttention):
    """`before` takes (B, S, C) to what the projections read, `after` what they return to (B, S, C)."""

    def __init__(self, before: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.before, self.after = before, after

    def forward(self, x: Tensor) -> Tensor:
        read = self.before(x)
        operands = (toys.heads(self.after(getattr(self, name)(read))) for name in "qkv")
        return F.scaled_dot_product_attention(*operands).transpose(1, 2).flatten(2)


def sequence_first() -> Layout:
    return Layout(lambda x: x.transpose(0, 1), lambda y: y.transpose(0, 1))


def space_first() -> Layout:
    return Layout(lambda x: x.unflatten(1, (FRAMES, -1)).transpose(1, 2), lambda y: y.transpose(1, 2).flatten(1, 2))


def frames_lead() -> Layout:
    return Layout(
        lambda x: x.unflatten(1, (FRAMES, -1)).flatten(0, 1), lambda y: y.unflatten(0, (-1, FRAMES)).flatten(1, 2)
    )


FOLLOWED = {"sequence first": sequence_first, "space first": space_first, "frames lead": frames_lead}
MOVED: dict[str, Callable[[Tensor], Tensor]] = {
    "rolled": lambda y: y.roll(5, 1),
    "reversed": lambda y: y.flip(1),
    "sorted": lambda y: y[:, ORDER],
    "regrouped": lambda y: y.unflatten(1, (FRAMES, -1)).transpose(1, 2).flatten(1, 2),
    "samples swapped": lambda y: y.flip(0),
}


def site_of(model: nn.Module, batch: int = 2) -> AttentionSite:
    (site,) = discover(model, (toys.tokens(TOKENS, batch),), min_tokens=40).sites
    return site


def gates_only(model: nn.Module) -> Tensor:
    """Let the update of a token be its gate; returns the gate's weight."""
    (branch,) = branches(model).values()
    with torch.no_grad():
        branch.proj_bias.fill_(1.0)
        branch.gate_weight.copy_(torch.randn(branch.gate_weight.shape, generator=torch.Generator().manual_seed(3)))
    return branch.gate_weight.detach()


@pytest.mark.parametrize(
    ("batches", "compiled"),
    [
        ((1, 2), False),
        ((2, 1), False),
        ((2, 3), True),
        *(
            pytest.param(*rest, marks=pytest.mark.all_cases)
            for rest in (((2, 3), False), ((1, 2), True), ((2, 1), True))
        ),
    ],
)
@pytest.mark.parametrize("name", FOLLOWED)
def test_the_gate_meets_its_own_token(name: str, batches: tuple[int, int], compiled: bool) -> None:
    model, x = FOLLOWED[name](), toys.tokens(TOKENS, batches[1])
    dense = model(x)
    salad_compile.convert(model, CONFIG, example_inputs=(toys.tokens(TOKENS, batches[0]),), grid=(FRAMES, 3, 6))
    weight = gates_only(model)
    run = model
    if compiled:
        torch._dynamo.reset()
        run = torch.compile(model, backend="salad", options={"lowering": "eager"}, fullgraph=True)
    gate = torch.sigmoid(x @ weight)[..., None].expand_as(dense)
    torch.testing.assert_close(run(x) - dense, gate, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", MOVED)
def test_tokens_moved_after_the_projections_are_refused(name: str) -> None:
    site = site_of(Layout(lambda x: x, MOVED[name]))
    assert not site.eligible
    assert "the tokens are moved" in site.reason


def test_an_order_that_the_forward_computes_is_refused() -> None:
    site = site_of(Layout(lambda x: x, lambda y: y[:, torch.randperm(TOKENS)]))
    assert not site.eligible
    assert "an index is known at run time only" in site.reason


def test_tokens_moved_before_the_projections_are_no_matter() -> None:
    assert site_of(Layout(lambda x: x.flip(1), lambda y: y)).eligible


class Folded(toys.SelfAttention):
    """Heads folded into the batch."""

    def forward(self, x: Tensor) -> Tensor:
        operands = (toys.heads(getattr(self, name)(x)).flatten(0, 1) for name in "qkv")
        return F.scaled_dot_product_attention(*operands).unflatten(0, (x.shape[0], -1)).transpose(1, 2).flatten(2)


def test_heads_in_the_batch_are_refused_with_several_samples() -> None:
    assert site_of(Folded(), batch=1).eligible
    site = site_of(Folded())
    assert not site.eligible
    assert "heads and batch are one axis" in site.reason


class RollsPairs(toys.SelfAttention):
    """Moves tokens in batches of two or more only."""

    def forward(self, x: Tensor) -> Tensor:
        operands = [toys.heads(getattr(self, name)(x)) for name in "qkv"]
        if x.shape[0] > 1:
            operands = [operand.roll(5, 2) for operand in operands]
        return F.scaled_dot_product_attention(*operands).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("model", [RollsPairs, Folded])
def test_what_moves_tokens_in_other_calls_is_an_error_there(model: type[nn.Module], compiled: bool) -> None:
    run = salad_compile.convert(model(), CONFIG, example_inputs=(toys.tokens(TOKENS, 1),), grid=(FRAMES, 3, 6))
    if compiled:
        torch._dynamo.reset()
        run = torch.compile(run, backend="salad", options={"lowering": "eager"})
    run(toys.tokens(TOKENS, 1))
    with pytest.raises(Exception, match=r"the tokens are moved|heads and batch are one axis") as caught:
        run(toys.tokens(TOKENS, 2))
    assert isinstance(caught.value.__cause__ or caught.value, SiteLostError) or "SiteLostError" in str(caught.value)


def test_attention_in_five_dimensions_stays_dense_and_says_why() -> None:
    class Extra(toys.SelfAttention):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (toys.heads(p(x)).unsqueeze(1) for p in (self.q, self.k, self.v))
            result: Tensor = self.o(F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2).flatten(2))
            return result

    (site,) = discover(Extra(), (toys.tokens(),), min_tokens=8).sites
    assert "5 dimensions" in site.reason


def test_padded_channels_are_no_other_tokens() -> None:
    class Padded(toys.SelfAttention):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (F.pad(toys.heads(p(x)), (0, 5)) for p in (self.q, self.k, self.v))
            result: Tensor = self.o(F.scaled_dot_product_attention(q, k, v)[..., :-5].transpose(1, 2).flatten(2))
            return result

    (site,) = discover(Padded(), (toys.tokens(),), min_tokens=8).sites
    assert site.eligible, site.reason  # `plan` says that channels of no projection are among its heads
