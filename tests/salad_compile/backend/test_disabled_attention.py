"""Attention under `torch.compiler.disable`, which no graph holds: a model that was never converted is told so, once."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import salad_compile
from salad_compile.backend import announcements
from salad_compile.backend.disabled_attention import disabled_attention
from tests.support import TINY

OPTIONS = {"min_tokens": 64, "sparsity": 0.5, "query_block": 16, "key_block": 16, "lowering": "eager"}

pytestmark = pytest.mark.usefixtures("as_if_alone")


def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2)).softmax(-1) @ v


def through_another(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return mix(q, k, v)


def without_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q + k.softmax(-1)) * v


class Block(nn.Module):
    """Its projections run in the arguments of the call: Dynamo gives the whole frame up at a break there."""

    def __init__(self, attend: Callable[..., Tensor] = mix) -> None:
        super().__init__()
        self.attend = attend
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        taken = self.attend(*(f(x).unflatten(-1, (2, 8)).transpose(1, 2) for f in (self.q, self.k, self.v)))
        out: Tensor = x + self.o(taken.transpose(1, 2).flatten(2))
        return out


class InLines(Block):
    """The same, where Dynamo goes on behind the break."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (2, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        taken = self.attend(q, k, v)
        out: Tensor = x + self.o(taken.transpose(1, 2).flatten(2))
        return out


class DisabledMethod(Block):
    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class DisabledSomewhere(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)

    @torch.compiler.disable
    def inner(self, x: Tensor) -> Tensor:
        return super().forward(x)


@torch.compiler.disable
class DisabledClass(InLines):
    pass


class Processor:
    @torch.compiler.disable
    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return through_another(q, k, v)


class Between(nn.Module):
    """Norms and projections of its own around attention that is disabled."""

    def __init__(self, inner: nn.Module, linear: bool) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(16), inner
        self.feed = nn.Linear(16, 16) if linear else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.feed(x + self.inner(self.norm(x)))
        return out


CASES: dict[str, Callable[[], nn.Module]] = {
    "function": lambda: Block(torch.compiler.disable(mix)),
    "of dynamo": lambda: Block(torch._dynamo.disable(mix)),
    "not recursive": lambda: Block(torch.compiler.disable(mix, recursive=False)),
    "with a reason": lambda: InLines(torch.compiler.disable(mix, reason="it has a kernel of its own")),
    "by hand": lambda: InLines(torch.compiler.disable(by_hand)),
    "a function further": lambda: Block(torch.compiler.disable(through_another)),
    "partial": lambda: Block(functools.partial(torch.compiler.disable(mix))),
    "processor": lambda: Block(Processor()),
    "forward": DisabledMethod,
    "method": DisabledSomewhere,
    "module": lambda: torch.compiler.disable(Block()),
    "class": DisabledClass,
    "between projections": lambda: Between(DisabledMethod(), linear=True),
    "between norms": lambda: Between(DisabledMethod(), linear=False),
}


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[[nn.Module], list[str]]:
    """What two compiled forwards of a model say."""
    for name, value in (("_announced", set()), ("_told_disabled", weakref.WeakSet()), ("_explained", [])):
        monkeypatch.setattr(announcements, name, value)

    def run(model: nn.Module, options: dict[str, Any] = OPTIONS) -> list[str]:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compiled = torch.compile(model, backend="salad", options=options)
        caplog.clear()
        with caplog.at_level("WARNING", "salad_compile"):
            for _ in range(2):
                compiled(torch.randn(1, 96, 16))
        return [record.getMessage() for record in caplog.records if "nothing was rewritten" in record.getMessage()]

    return run


@pytest.mark.parametrize("case", CASES)
def test_disabled_attention_is_told_once_with_its_place(case: str, said: Callable[..., list[str]]) -> None:
    model = nn.Sequential(CASES[case](), CASES[case]())
    messages = said(model)
    assert len(messages) == 1, messages
    for words in ("no attention call was seen", "torch.compiler.disable", __file__, "salad_compile.convert(model)"):
        assert words in messages[0], messages[0]
    assert said(model) == []


@pytest.mark.parametrize("cls", [Block, InLines])
def test_a_model_without_attention_is_not_told_that_some_is_disabled(
    cls: type[Block], said: Callable[..., list[str]]
) -> None:
    model = cls(torch.compiler.disable(without_attention))
    assert disabled_attention(model) == []
    assert not any("this attention is under" in message for message in said(model))


def test_the_sites_of_a_converted_model_run_elsewhere(said: Callable[..., list[str]]) -> None:
    model = nn.Sequential(*(Block(torch.compiler.disable(mix)) for _ in range(2)))
    salad_compile.convert(model, TINY, example_inputs=(torch.randn(1, 160, 16),))
    assert disabled_attention(model)
    assert said(model, {"lowering": "eager"}) == []


def test_a_disabled_path_that_no_forward_takes_is_not_told(said: Callable[..., list[str]]) -> None:
    model = Block()
    model.fallback = torch.compiler.disable(mix)  # type: ignore[assignment]
    assert disabled_attention(model)
    assert said(model) == []


def test_other_backends_are_not_told(said: Callable[..., list[str]], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", "salad_compile"):
        torch.compile(Block(torch.compiler.disable(mix)), backend="eager")(torch.randn(1, 96, 16))
    assert not caplog.records


def test_a_reset_of_dynamo_takes_away_the_callbacks_of_others() -> None:
    ends: list[Any] = torch._dynamo.callback_handler.end_callbacks
    ours, of_another = list(ends), lambda _: None
    torch._dynamo.on_compile_end(of_another)
    torch._dynamo.reset()
    assert ours
    assert list(torch._dynamo.callback_handler.end_callbacks) == ours
