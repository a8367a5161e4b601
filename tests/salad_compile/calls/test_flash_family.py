"""flash_attn and its family, without an adapter: the same numbers and gradients as the model that calls SDPA."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import salad_compile
from salad_compile.sites.branch import branches
from tests.models import flash_packages as packages

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
CONFIG = {"compensation": "none", "min_tokens": 64, "sparsity": 0.5, "query_block": 16, "key_block": 16, "lora_rank": 2}
AOT: dict[str, Any] = {"backend": "salad", "options": {"lowering": "aot_eager"}}
TOKENS, BATCH, DIM, TEXT = 96, 2, 24, 8


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend = attend
        self.q, self.k, self.v, self.o = (nn.Linear(DIM, DIM) for _ in range(4))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(context), self.v(context)
        return self.o(self.attend(*(each.unflatten(-1, (2, -1)) for each in (q, k, v))).flatten(2))


class Net(nn.Module):
    """Self-attention, which is converted, and cross-attention through the same function, which stays dense."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.own, self.cross = Attention(attend), Attention(attend)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = x + self.own(x, x)
        return x + self.cross(x, text)


class FusedNet(nn.Module):
    """One projection for query, key and value, which the function takes as one tensor."""

    def __init__(self, attend: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.attend = attend
        self.qkv, self.o = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        return x + self.o(self.attend(self.qkv(x).unflatten(-1, (3, 2, -1))).flatten(2))


def net(attend: Callable[..., Tensor], kind: type[nn.Module] = Net) -> nn.Module:
    torch.manual_seed(0)
    model = kind(attend).double()
    model = salad_compile.convert(model, CONFIG, example_inputs=inputs())
    generator = torch.Generator().manual_seed(1)
    for branch in branches(model).values():
        for _, parameter in sorted(branch.named_parameters()):
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2
            parameter.data.copy_(values)
    return model


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x, text = (torch.randn(BATCH, n, DIM, generator=generator, dtype=torch.float64) for n in (TOKENS, TEXT))
    return {"x": x, "text": text}


def run(model: nn.Module, call: Callable[..., Tensor]) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    model.requires_grad_(True)
    out = call(**inputs())
    out.square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"": out.detach(), **grads}


@pytest.fixture(scope="module")
def want() -> dict[str, Tensor]:
    model = net(sdpa)
    return run(model, model)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def flash_2(package: Any) -> Attend:
    return lambda q, k, v: package.flash_attn_func(q, k, v)


def flash_2_several(package: Any) -> Attend:
    return lambda q, k, v: package.flash_attn_func(q, k, v, return_attn_probs=True)[0]


def varlen(package: Any) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ends_q, ends_k = (torch.arange(len(x) + 1, dtype=torch.int32) * x.shape[1] for x in (q, k))
        q_, k_, v_ = (x.flatten(0, 1) for x in (q, k, v))
        out = package.flash_attn_varlen_func(q_, k_, v_, ends_q, ends_k, q.shape[1], k.shape[1])
        return out.unflatten(0, (len(q), -1))  # type: ignore[no-any-return]

    return attend


def flash_4(package: Any) -> Attend:
    return lambda q, k, v: package.flash_attn_func(q, k, v)[0]


def sage(package: Any) -> Attend:
    return lambda q, k, v: package.sageattn(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def sage_tokens_first(package: Any) -> Attend:
    return lambda q, k, v: package.sageattn(q, k, v, tensor_layout="NHD")


def xformers(package: Any) -> Attend:
    return lambda q, k, v: package.memory_efficient_attention(q, k, v, scale=(DIM // 2) ** -0.5)


CALLS: dict[str, tuple[Callable[[], Any], Callable[[Any], Attend]]] = {
    "flash_attn": (packages.flash_attn_2, flash_2),
    "flash_attn, three results": (packages.flash_attn_2, flash_2_several),
    "flash_attn, varlen": (packages.flash_attn_2, varlen),
    "flash_attn_3": (packages.flash_attn_3, flash_2),
    "flash_attn_4": (packages.flash_attn_4, flash_4),
    "sageattention": (packages.sageattention, sage),
    "sageattention, tokens first": (packages.sageattention, sage_tokens_first),
    "xformers": (packages.xformers, xformers),
}


def check(model: nn.Module, want: dict[str, Tensor], lowering: str = "eager") -> None:
    """Outputs and all gradients, uncompiled and compiled, and outputs without gradients."""
    assert len(branches(model)) == 1
    compiled = torch.compile(model, backend="salad", options={"lowering": lowering})
    for call in (model, compiled):
        got = run(model, call)
        assert got.keys() == want.keys()
        for name in want:
            torch.testing.assert_close(got[name], want[name], msg=lambda text, name=name: f"{name}: {text}")
    # the graph without gradients is the forward that AOTAutograd splits off: one more compilation where it does
    with torch.no_grad():
        for call in (model, compiled) if lowering == "aot_eager" else (model,):
            torch.testing.assert_close(call(**inputs()), want[""])


@pytest.mark.parametrize("how", CALLS)
def test_it_computes_and_trains_as_with_sdpa(how: str, want: dict[str, Tensor]) -> None:
    package, attend = CALLS[how]
    with packages.imported(package()) as module:
        # once the call is replaced, the graphs are alike: AOTAutograd sees one of each shape of arguments
        check(net(attend(module)), want, "aot_eager" if how in ("flash_attn", "flash_attn, varlen") else "eager")


def packed(package: Any) -> Callable[[Tensor], Tensor]:
    return lambda qkv: package.flash_attn_qkvpacked_func(qkv)


def packed_pair(package: Any) -> Callable[[Tensor], Tensor]:
    return lambda qkv: package.flash_attn_kvpacked_func(qkv[:, :, 0], qkv[:, :, 1:])


def packed_varlen(package: Any) -> Callable[[Tensor], Tensor]:
    def attend(qkv: Tensor) -> Tensor:
        ends = torch.arange(len(qkv) + 1, dtype=torch.int32) * qkv.shape[1]
        out = package.flash_attn_varlen_qkvpacked_func(qkv.flatten(0, 1), ends, qkv.shape[1])
        return out.unflatten(0, (len(qkv), -1))  # type: ignore[no-any-return]

    return attend


@pytest.mark.parametrize("attend", [packed, packed_pair, packed_varlen])
def test_packed_tensors(attend: Callable[[Any], Callable[[Tensor], Tensor]]) -> None:
    model = net(lambda qkv: sdpa(*qkv.unbind(2)), FusedNet)
    want = run(model, model)
    with packages.imported(packages.flash_attn_2()) as module:
        check(net(attend(module), FusedNet), want)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"window_size": (64, 64)}, r"window_size=\(64, 64\)"),
        ({"softcap": 30.0}, "softcap=30.0"),
        ({"alibi_slopes": torch.ones(2)}, "alibi_slopes"),
        ({"causal": True}, "it is causal"),
    ],
)
def test_other_attention_is_refused_with_its_reason(given: dict[str, Any], reason: str) -> None:
    with packages.imported(packages.flash_attn_2()) as module:
        torch.manual_seed(0)
        model = Net(lambda q, k, v: module.flash_attn_func(q, k, v, **given)).double()
        plan = salad_compile.plan(model, inputs(), config=salad_compile.SaladConfig(compensation="none", min_tokens=64))
    assert not plan.eligible

    assert re.search(reason, plan.sites[""][0].reason)


class Own(nn.Module):
    """Self-attention alone."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.own = Attention(attend)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.own(x, x)
        return result


def test_the_operator_that_diffusers_has_for_flash_attention_3() -> None:
    """It runs on GPUs alone; where its call is replaced, it never runs."""
    operator = pytest.importorskip("diffusers.models.attention_dispatch")._wrapped_flash_attn_3
    x = torch.randn(BATCH, TOKENS, DIM)

    def converted(attend: Attend) -> nn.Module:
        torch.manual_seed(0)
        model: nn.Module = salad_compile.convert(Own(attend), CONFIG, example_inputs=(x,))
        return model

    expected = converted(sdpa)(x)
    model = converted(lambda q, k, v: operator(q=q, k=k, v=v, softmax_scale=None, causal=False)[0])
    assert torch.equal(model(x), expected)
    torch._dynamo.reset()
    assert torch.allclose(torch.compile(model, **AOT)(x), expected, atol=1e-6)
    causal = Own(lambda q, k, v: operator(q=q, k=k, v=v, causal=True)[0])
    (site,) = salad_compile.plan(causal, (x,), config=CONFIG).sites[""]
    assert "causal" in site.reason
