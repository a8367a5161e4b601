"""Functions of einops that Dynamo keeps whole are named where they hide what a graph does."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import salad_compile
from salad_compile.backend import announcements
from salad_compile.errors import SiteLostError
from salad_compile.passes import whole_functions
from tests.support import TINY
from tests.toys import WIDTH, heads

OPTIONS = {"min_tokens": 64, "lowering": "eager"}


pytestmark = pytest.mark.usefixtures("as_if_alone")


def swap(x: Tensor) -> Tensor:
    """(B, H, S, D) with pairs of channels exchanged and turned."""
    return torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)


def weigh(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT) * 8**-0.5).softmax(-1) @ v


@torch.compiler.allow_in_graph
def rearrange(x: Tensor) -> Tensor:
    return swap(x)


@torch.compiler.allow_in_graph
def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return weigh(q, k, v)


@pytest.fixture(autouse=True)
def _as_if_of_einops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole_functions, "_PACKAGE", "tests")


class Attention(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads(linear(x)) for linear in (self.q, self.k, self.v))
        if self.how == "position":
            angles = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * 0.1
            q, k = (t * angles.cos() + rearrange(t) * angles.sin() for t in (q, k))
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            out = einsum(q, k, v)
        result: Tensor = self.o(out.transpose(1, 2).flatten(2))
        return result


@pytest.mark.parametrize(
    ("how", "name"),
    [("position", "einops.rearrange"), ("products", "einops.einsum")],
)
def test_errors_name_them(how: str, name: str) -> None:
    torch._dynamo.reset()
    x = torch.randn(1, 160, WIDTH)
    config = {**TINY.to_dict(), "rope_placement": "map-then-rotate"}
    model = salad_compile.convert(Attention(how), config, example_inputs=(x,))
    assert model(x).isfinite().all()
    with pytest.raises(Exception, match=name) as raised:
        torch.compile(model, backend="salad", options={"lowering": "eager"})(x)
    inner = getattr(raised.value, "inner_exception", raised.value)
    assert isinstance(inner, SiteLostError)
    assert "einops 0.8.2 or later" in str(inner)


def test_so_does_what_a_compilation_says(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(announcements, "_announced", set())
    with caplog.at_level("WARNING", "salad_compile"):
        torch.compile(Attention("products"), backend="salad", options=OPTIONS)(torch.randn(1, 160, WIDTH))
    (message,) = (r.getMessage() for r in caplog.records if "nothing was rewritten" in r.getMessage())
    assert "einops.einsum" in message
