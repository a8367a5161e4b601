"""Which attention calls of an unconverted model become block-sparse, and why the others do not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn as nn
from torch import Tensor, fx

from salad_compile.config import BackendOptions
from salad_compile.passes.attention_call import LEFT_DENSE, TRAINING_FREE, AttentionCall
from salad_compile.passes.find_attention import find_attention
from tests import toys

OPTIONS = BackendOptions(min_tokens=64)


def calls_of(model: nn.Module, *inputs: Tensor, options: BackendOptions = OPTIONS) -> list[AttentionCall]:
    found: list[AttentionCall] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., object]:
        for module in gm.modules():
            if isinstance(module, fx.GraphModule):
                found.extend(find_attention(module.graph, options))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(model, backend=backend, fullgraph=True)(*inputs)
    return found


@pytest.mark.parametrize("attend", [toys.positional, toys.keywords, toys.mixed, toys.rotated_in_place])
def test_self_attention_is_found_however_it_is_called(attend: toys.Attend) -> None:
    (call,) = calls_of(toys.SelfAttention(attend), toys.tokens())
    assert call.status == TRAINING_FREE
    assert call.reason == ""
    assert call.dtype == torch.float32
    assert call.scale == pytest.approx(0.5 if attend is toys.keywords else 8**-0.5)


@pytest.mark.parametrize(
    ("attend", "reason"),
    [
        (toys.causal, "it is causal"),
        (
            toys.masked,
            "its attention mask is no key-padding mask: not bool, or not the same for all heads, or of one key",
        ),
        (toys.dropped, "it applies dropout (p=0.1)"),
    ],
)
def test_what_stays_dense_says_why(attend: toys.Attend, reason: str) -> None:
    (call,) = calls_of(toys.SelfAttention(attend), toys.tokens())
    assert (call.status, call.reason) == (LEFT_DENSE, reason)


def test_cross_attention_of_equal_length_is_not_self_attention() -> None:
    (call,) = calls_of(toys.CrossAttention(), toys.tokens())
    assert (call.status, call.reason) == (LEFT_DENSE, "cross-attention")


def test_short_sequences_stay_dense() -> None:
    (call,) = calls_of(toys.SelfAttention(), toys.tokens(63))
    assert (call.status, call.reason) == (LEFT_DENSE, "63 tokens, fewer than min_tokens=64")


def test_attention_without_projections_in_the_graph_stays_dense() -> None:
    class Core(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return toys.positional(q, k, v)

    x = toys.heads(toys.tokens())
    (call,) = calls_of(Core(), x, x, x)
    assert call.status == LEFT_DENSE
    assert "projection" in call.reason


def test_calls_in_checkpoint_bodies_are_found() -> None:
    model = toys.Stack(toys.SelfAttention(), toys.SelfAttention(), recompute=True)
    assert [call.status for call in calls_of(model, toys.tokens().requires_grad_())] == [TRAINING_FREE] * 2
