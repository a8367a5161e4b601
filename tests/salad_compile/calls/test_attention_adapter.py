"""Operators of one's own through `attention_adapter`: what is checked, and what a wrong adapter says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor
from torch.overrides import TorchFunctionMode

import salad_compile
from salad_compile.calls.adapters import _ADAPTERS, AttentionArguments, attention_adapter, is_attention
from salad_compile.errors import AdapterError, SiteLostError
from tests.models import attention_styles as styles
from tests.salad_compile.conversion.test_convert import assert_unchanged, fingerprint
from tests.support import TINY


class Attention(nn.Module):
    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.attend = attend
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(*(linear(x).unflatten(-1, (2, 8)) for linear in (self.q, self.k, self.v)))


@pytest.fixture
def adapters() -> Iterator[None]:
    """Adapters are for the whole process: put them back."""
    before = dict(_ADAPTERS)
    yield
    _ADAPTERS.clear()
    _ADAPTERS.update(before)


def test_every_spelling_of_an_operator_is_known() -> None:
    assert is_attention(torch.ops.toy.flash_attention.default)
    assert is_attention(torch.ops.toy.flash_attention)


def test_a_mode_sees_operators_of_torch_library() -> None:
    class Seen(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.functions: list[Any] = []

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.functions.append(func)
            return func(*args, **(kwargs or {}))

    x = torch.randn(1, 4, 2, 8)
    with Seen() as seen:
        styles.flash_attention(x, x, x)
        torch.ops.toy.flash_attention(x, x, x)
    assert len(seen.functions) == 2
    assert all(is_attention(function) for function in seen.functions)


WRONG: dict[str, tuple[Callable[..., Any], str]] = {
    "signature": (lambda q, k: None, "does not take this call"),
    "computes": (lambda q, k, v, scale=None: q.nonsense(), "AttributeError"),
    "answer": (lambda q, k, v, scale=None: (q, k, v), "not AttentionArguments"),
    "layout": (lambda q, k, v, scale=None: AttentionArguments(q, k, v, layout="BHDS"), "Did you mean"),
    "rank": (lambda q, k, v, scale=None: AttentionArguments(q, k, v, layout="SHD", output=0), "has 4 dimensions"),
    "operand": (lambda q, k, v, scale=None: AttentionArguments(q, k, scale, layout="BSHD", output=0), "as value"),
    "output": (lambda q, k, v, scale=None: AttentionArguments(q, k, v, layout="BSHD"), "answered 2 results"),
    "position": (lambda q, k, v, scale=None: AttentionArguments(q, k, v, layout="BSHD", output=2), "output=2"),
    "shape": (lambda q, k, v, scale=None: AttentionArguments(q, k, v, layout="BSHD", output=1), "shape"),
}


@pytest.mark.parametrize(("adapter", "message"), WRONG.values(), ids=WRONG.keys())
@pytest.mark.usefixtures("adapters")
def test_wrong_adapters(adapter: Callable[..., Any], message: str) -> None:
    attention_adapter(styles.flash_attention)(adapter)
    model = Attention(lambda q, k, v: styles.flash_attention(q, k, v)[0])
    before = fingerprint(model)
    with pytest.raises(AdapterError, match=message):
        salad_compile.convert(model, TINY, example_inputs=(torch.randn(1, 100, 16),))
    assert_unchanged(model, before)


def test_targets_must_be_callable() -> None:
    with pytest.raises(AdapterError, match="functions or torch operators"):
        attention_adapter("flash_attn")


def test_packed_samples_of_different_lengths_are_refused() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        packed = (tensor.flatten(0, 1) for tensor in (q, k, v))
        return styles.varlen_attention(*packed, torch.tensor([0, 90, 200], dtype=torch.int32), 0.3)

    model = salad_compile.convert(Attention(attend), TINY, example_inputs=(torch.randn(2, 100, 16),))
    with pytest.raises(SiteLostError, match="different lengths"):
        model(torch.randn(2, 100, 16))


def test_the_other_results_of_a_converted_call_are_none() -> None:
    seen = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = styles.flash_attention(q, k, v)
        seen.append(lse)
        return out

    x = torch.randn(1, 100, 16)
    model = salad_compile.convert(Attention(attend), TINY, example_inputs=(x,))
    model(x)
    assert seen[-1] is None


def test_a_reason_of_the_adapter_is_shown() -> None:
    @torch.library.custom_op("toy::windowed", mutates_args=())
    def windowed(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        return v.clone()

    @attention_adapter(windowed)
    def _(q: Any, k: Any, v: Any, window: int) -> AttentionArguments:
        return AttentionArguments(q, k, v, layout="BSHD", reason=f"it has a window of {window}")

    x = torch.randn(1, 100, 16)
    plan = salad_compile.plan(Attention(lambda q, k, v: windowed(q, k, v, 7)), (x,), config=TINY)
    assert [site.reason for site in plan.sites[""]] == ["it has a window of 7"]
