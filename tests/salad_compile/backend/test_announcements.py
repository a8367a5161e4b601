"""A compilation that rewrites nothing says so, with the reason and what helps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import salad_compile
from salad_compile.backend import announcements
from salad_compile.calls import adapters
from salad_compile.sites.branch import branches
from tests.support import TINY
from tests.toys import SelfAttention

OPTIONS = {"min_tokens": 64, "sparsity": 0.5, "query_block": 16, "key_block": 16, "lowering": "aot_eager"}


pytestmark = pytest.mark.usefixtures("as_if_alone")


@torch.library.custom_op("toy::unheard_of", mutates_args=())
def unheard_of(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2)).softmax(-1) @ v


@unheard_of.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


class Attention(nn.Module):
    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.attend = attend
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (linear(x).unflatten(-1, (2, 8)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        out: Tensor = self.o(self.attend(q, k, v).transpose(1, 2).flatten(2))
        return out


def printing(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    torch._dynamo.graph_break("to say something")
    return F.scaled_dot_product_attention(q, k, v)


def in_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of no softmax: nothing that anybody could know."""
    return (q @ k.transpose(-1, -2)).relu() @ v


def dropping(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, dropout_p=0.1)


def never_called(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q


class NeverApplied(torch.autograd.Function):
    pass


def said_by(
    model: nn.Module, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tokens: int = 96
) -> list[str]:
    """What two compiled forwards say, while another model of the process is converted."""
    torch._dynamo.reset()
    monkeypatch.setattr(announcements, "_announced", set())
    converted = salad_compile.convert(SelfAttention(), TINY, example_inputs=(torch.randn(1, 160, 16),))
    compiled = torch.compile(model, backend="salad", options=OPTIONS)
    caplog.clear()
    with torch.no_grad(), caplog.at_level("WARNING", "salad_compile"):
        for _ in range(2):
            compiled(torch.randn(1, tokens, 16))
    assert branches(converted)
    return [record.getMessage() for record in caplog.records if "nothing was rewritten" in record.getMessage()]


@pytest.mark.parametrize(
    ("attend", "tokens", "said"),
    [
        (unheard_of, 96, ["toy.unheard_of", "attention_adapter"]),
        (
            torch.compiler.disable(F.scaled_dot_product_attention),
            96,
            ["The graph breaks", "torch.compiler.disable", __file__],
        ),
        (printing, 96, ["The graph breaks", f"{__file__}:", "salad_compile.convert(model)"]),
        (in_products, 96, ["its function is not known", "attention_adapter"]),
        (F.scaled_dot_product_attention, 40, ["40 tokens, fewer than min_tokens=64", "options={'min_tokens'"]),
        (dropping, 96, ["dropout (p=0.1)", "model.eval()"]),
    ],
    ids=["unknown", "disabled", "break", "products", "short", "dropout"],
)
def test_what_is_said_where_nothing_is_rewritten(
    attend: Callable[..., Tensor],
    tokens: int,
    said: list[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    messages = said_by(Attention(attend), caplog, monkeypatch, tokens)
    assert len(messages) == 1, messages
    assert all(words in messages[0] for words in said), messages[0]


def test_the_break_of_another_model_is_not_the_reason(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    said_by(Another(), caplog, monkeypatch)
    (message,) = said_by(Attention(in_products), caplog, monkeypatch)
    assert "breaks" not in message


class Another(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x


def test_converted_models_are_not_told_of_graphs_without_sites(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its other parts, compiled by themselves, have nothing to rewrite."""
    model = nn.ModuleDict({"attention": SelfAttention(), "other": Attention(in_products)})
    model.forward = lambda x: model["other"](model["attention"](x))  # type: ignore[method-assign]
    monkeypatch.setattr(announcements, "_announced", set())
    salad_compile.convert(model, TINY, example_inputs=(torch.randn(1, 160, 16),))
    torch._dynamo.reset()
    with caplog.at_level("WARNING", "salad_compile"):
        torch.compile(model["other"], backend="salad", options=OPTIONS)(torch.randn(1, 96, 16))
    assert not [record for record in caplog.records if "nothing was rewritten" in record.getMessage()]


@pytest.fixture(params=[never_called, NeverApplied])
def registered(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a target of `attention_adapter` that no model here calls."""
    monkeypatch.setattr(adapters, "_unmet", {})
    monkeypatch.setattr(adapters, "_ADAPTERS", dict(adapters._ADAPTERS))

    @salad_compile.attention_adapter(request.param)
    def _(q: Any, k: Any, v: Any) -> salad_compile.AttentionArguments:
        return salad_compile.AttentionArguments(q, k, v)

    name: str = request.param.__qualname__
    return name


def test_an_adapter_that_is_never_met_is_named_by_plan(registered: str, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        salad_compile.plan(SelfAttention(), (torch.randn(1, 160, 16),), config=TINY)
    assert [record.getMessage().split(",")[0] for record in caplog.records] == [f"no forward has called {registered}"]


def test_an_adapter_that_is_never_met_is_named_while_compiling(
    registered: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(announcements, "_announced", set())
    with caplog.at_level("WARNING", "salad_compile"):
        torch.compile(Attention(in_products), backend="salad", options=OPTIONS)(torch.randn(1, 96, 16))
    messages = [record.getMessage() for record in caplog.records if "nothing was rewritten" in record.getMessage()]
    assert len(messages) == 1
    assert f"attention_adapter was used for {registered}" in messages[0]
