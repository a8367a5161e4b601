"""A compilation that rewrites nothing says so, with the reason and what helps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from salad_compile.backend import announcements

OPTIONS = {"min_tokens": 64, "sparsity": 0.5, "query_block": 16, "key_block": 16, "lowering": "aot_eager"}


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


@pytest.mark.parametrize(
    ("attend", "said"),
    [
        (unheard_of, ["toy.unheard_of", "attention_adapter"]),
        (torch.compiler.disable(F.scaled_dot_product_attention), ["The graph breaks", "torch.compiler.disable"]),
    ],
    ids=["unknown", "disabled"],
)
def test_what_is_said_where_nothing_is_rewritten(
    attend: Callable[..., Tensor],
    said: list[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(announcements, "_announced", set())
    monkeypatch.setattr(announcements, "any_converted", lambda: False)  # by other tests of this process
    compiled = torch.compile(Attention(attend), backend="salad", options=OPTIONS)
    with torch.no_grad(), caplog.at_level("WARNING", "salad_compile"):
        for _ in range(2):
            compiled(torch.randn(1, 96, 16))
    messages = [record.getMessage() for record in caplog.records if "nothing was rewritten" in record.getMessage()]
    assert len(messages) == 1
    assert all(words in messages[0] for words in said), messages[0]
