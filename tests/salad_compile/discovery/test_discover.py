"""Discovery on toys: kinds, reasons, owners, quantised and wrapped projections, and leaving the model alone."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor

import salad_compile
from salad_compile.discovery.attention_site import AttentionSite
from salad_compile.discovery.discover import discover
from salad_compile.errors import InputsError, ProbeError
from tests import toys
from tests.support import TINY, relative_error


def sites_of(model: nn.Module, *inputs: Tensor, min_tokens: int = 64) -> list[AttentionSite]:
    return discover(model, inputs, min_tokens=min_tokens).sites


@pytest.mark.parametrize(
    ("attend", "reason"),
    [
        (toys.positional, ""),
        (toys.rotated_in_place, ""),
        (toys.causal, "it is causal"),
        (
            toys.masked,
            "its attention mask is no key-padding mask: not bool, or not the same for all heads, or of one key",
        ),
        (toys.dropped, ""),
        (toys.grouped, ""),
    ],
)
def test_self_attention_and_what_keeps_it_dense(attend: toys.Attend, reason: str) -> None:
    (site,) = sites_of(toys.SelfAttention(attend), toys.tokens())
    assert (site.kind, site.reason, site.eligible) == ("self", reason, not reason)
    assert (site.query, site.key, site.value, site.out) == (("q",), ("k",), ("v",), "o")
    assert (site.batch, site.heads, site.query_tokens, site.head_dim) == (2, 2, 70, 8)


class OneOfSeveralViews(nn.Module):
    """Writes into parts of one projection's output, which autograd refuses: these models are for inference."""

    def __init__(self, parts: Callable[[Tensor], tuple[Tensor, ...]], write: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(toys.WIDTH, 3 * toys.WIDTH), nn.Linear(toys.WIDTH, toys.WIDTH)
        self.parts, self.write = parts, write

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.parts(self.qkv(x))
        self.write(query)
        self.write(key)
        result: Tensor = self.o(toys.positional(*map(toys.heads, (query, key, value))).transpose(1, 2).flatten(2))
        return result


@pytest.mark.parametrize("placement", ["rotate-then-map", "auto"])
@pytest.mark.parametrize("write", [lambda t: t.mul_(2), lambda t: t[..., :4].add_(1)], ids=["all", "channels"])
@pytest.mark.parametrize(
    "parts", [lambda t: t.chunk(3, -1), lambda t: t.unflatten(-1, (3, -1)).unbind(-2)], ids=["chunk", "unbind"]
)
def test_writes_that_autograd_refuses(parts: Any, write: Any, placement: str) -> None:
    model, x = OneOfSeveralViews(parts, write), toys.tokens(100)
    with torch.no_grad():
        dense = model(x)
    config = dataclasses.replace(TINY, sparsity=0.0, rope_placement=placement)
    salad_compile.convert(model, config, example_inputs=(x,))
    with torch.no_grad():
        assert relative_error(model(x), dense) < 1e-5


def test_cross_attention_of_equal_length() -> None:
    (site,) = sites_of(toys.CrossAttention(), toys.tokens())
    assert (site.kind, site.eligible) == ("cross", False)


def test_views_and_casts_of_one_value_are_one_input() -> None:
    class Viewing(toys.SelfAttention):
        def forward(self, x: Tensor) -> Tensor:
            x = x * 1.0
            q, k = self.q(x.view(2, -1, toys.WIDTH)), self.k(x.double().float())
            out = toys.positional(toys.heads(q), toys.heads(k), toys.heads(self.v(x.reshape(2, -1, toys.WIDTH))))
            return self.o(out.transpose(1, 2).flatten(2))

    (site,) = sites_of(Viewing(), toys.tokens())
    assert (site.kind, site.eligible) == ("self", True)


def test_min_tokens() -> None:
    (site,) = sites_of(toys.SelfAttention(), toys.tokens(63))
    assert (site.eligible, site.reason) == (False, "63 tokens, fewer than min_tokens=64")


@pytest.mark.parametrize("order", [("x", "text"), ("text", "x")])
def test_the_video_is_the_input_with_the_most_tokens(order: tuple[str, str]) -> None:
    class TwoStreams(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.video, self.refiner = toys.SelfAttention(), toys.SelfAttention()

        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            x, text = (first, second) if order[0] == "x" else (second, first)
            return self.video(x) + self.refiner(text).mean(1, keepdim=True)

    inputs = {"x": toys.tokens(90), "text": toys.tokens(70)}
    sites = {site.name: site for site in sites_of(TwoStreams(), *(inputs[name] for name in order))}
    assert sites["video"].eligible
    name = "first" if order[0] == "text" else "second"
    assert (sites["refiner"].eligible, sites["refiner"].reason) == (False, f"no video: it reads {name!r}")


def test_two_streams_are_joint_attention() -> None:
    class Joint(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.video, self.text = toys.SelfAttention(), toys.SelfAttention()

        def forward(self, x: Tensor, text: Tensor) -> Tensor:
            q, k, v = (
                torch.cat([toys.heads(getattr(self.video, n)(x)), toys.heads(getattr(self.text, n)(text))], 2)
                for n in "qkv"
            )
            return toys.positional(q, k, v)

    (site,) = sites_of(Joint(), toys.tokens(), toys.tokens(9))
    assert (site.kind, site.name, site.eligible) == ("joint", "", True)
    assert site.query == ("video.q", "text.q")
    assert (site.text, site.text_tokens, site.video_tokens, site.query_tokens) == ("after", 9, 70, 79)


def test_the_owner_contains_call_and_projections() -> None:
    class Core(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return toys.positional(q, k, v)

    core = Core()
    model = toys.Stack(toys.SelfAttention(core), toys.SelfAttention(core))
    assert [site.name for site in sites_of(model, toys.tokens())] == ["layers.0", "layers.1"]


def test_calls_that_share_a_forward_are_refused() -> None:
    class Twice(toys.SelfAttention):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(super().forward(x))

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p, self.q, self.k, self.v, self.a, self.b = (nn.Linear(toys.WIDTH, toys.WIDTH) for _ in range(6))

        def forward(self, x: Tensor) -> Tensor:
            x = toys.positional(*(toys.heads(p(x)) for p in (self.q, self.k, self.v))).transpose(1, 2).flatten(2)
            return toys.positional(*(toys.heads(p(x)) for p in (self.p, self.a, self.b)))

    sites = sites_of(Both(), toys.tokens())
    assert [site.eligible for site in sites] == [False, False]
    assert all("share the forward of 'the model'" in site.reason for site in sites)
    # the same projections twice in one forward are refused too: a branch could not tell the calls apart
    assert [site.eligible for site in sites_of(Twice(), toys.tokens())] == [False, False]


def test_one_module_called_twice_is_one_site() -> None:
    shared = toys.SelfAttention()
    (site,) = sites_of(toys.Stack(shared, shared), toys.tokens())
    assert (site.name, site.invocations, site.eligible) == ("layers.0", 2, True)


def test_quantised_and_wrapped_projections_are_projections() -> None:
    class Adapter(nn.Module):
        """A Linear and a low-rank pair of Linears beside it, as peft wraps them."""

        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.in_features, self.out_features = linear.in_features, linear.out_features
            self.base_layer, self.lora_A, self.lora_B = linear, nn.Linear(16, 2), nn.Linear(2, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.base_layer(x) + self.lora_B(self.lora_A(x))

    for wrap in (toys.Int8Linear, Adapter):
        model = toys.SelfAttention()
        for name in "qkvo":
            setattr(model, name, wrap(getattr(model, name)))
        model.requires_grad_(False)
        (site,) = sites_of(model, toys.tokens())
        assert (site.kind, site.query, site.out, site.eligible) == ("self", ("q",), "o", True), wrap


def test_the_model_is_left_as_it_was() -> None:
    class Caching(toys.SelfAttention):
        """Caches a table on itself, in an attribute and in a dictionary."""

        def __init__(self) -> None:
            super().__init__()
            self.tables: dict[int, Tensor] = {}

        def forward(self, x: Tensor) -> Tensor:
            if not hasattr(self, "table"):
                self.table = torch.arange(x.shape[1], dtype=x.dtype)
            self.tables.setdefault(x.shape[1], self.table * 2)
            return super().forward(x + self.table[None, :, None] * 0)

    model = Caching()
    model.requires_grad_(False)
    state = torch.random.get_rng_state()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    (site,) = sites_of(model, toys.tokens())
    assert site.eligible
    assert not hasattr(model, "table")
    assert model.tables == {}
    assert model.training
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_reading_values_falls_back_to_real_tensors() -> None:
    class Trimming(toys.SelfAttention):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[:, : int((x.abs().sum((0, 2)) > 0).sum().item())])

    (site,) = sites_of(Trimming(), toys.tokens())
    assert (site.eligible, site.query_tokens) == (True, 70)


def test_errors_of_the_forward_are_chained() -> None:
    with pytest.raises(ProbeError, match="Pass example_inputs") as caught:
        sites_of(toys.SelfAttention(), torch.randn(2, 70, 3))
    assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(InputsError):
        discover(toys.SelfAttention(), None, min_tokens=64)
    with pytest.raises(InputsError, match="'y'"):
        discover(toys.SelfAttention(), {"y": toys.tokens()}, min_tokens=64)


def test_full_size_wan_14b_in_seconds_and_without_memory() -> None:
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        model = WanTransformer3DModel(
            num_attention_heads=40, attention_head_dim=128, num_layers=40, ffn_dim=13824, text_dim=4096
        )
    start = time.process_time()
    plan = salad_compile.plan(model)
    elapsed = time.process_time() - start
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert [site.name for site in plan.eligible] == [f"blocks.{i}.attn1" for i in range(40)]
    assert {site.query_tokens for site in plan.eligible} == {21 * 30 * 52}
    assert elapsed < 30, f"took {elapsed:.1f} CPU seconds"


@pytest.mark.parametrize(
    ("settings", "branch_parameters", "share"),
    [
        ({}, 70_871_070, "+4.99 %"),
        pytest.param({"scaling": "v2"}, 70_871_070 + 390, "+4.99 %", marks=pytest.mark.all_cases),
        pytest.param({"gate": "head"}, 71_378_280, "+5.03 %", marks=pytest.mark.all_cases),
        pytest.param({"gate": "none"}, 70_824_960, "+4.99 %", marks=pytest.mark.all_cases),
        pytest.param({"linear_branch": False}, 0, "+0.00 %", marks=pytest.mark.all_cases),
    ],
    ids=str,
)
def test_the_parameter_counts_of_the_paper(settings: dict[str, Any], branch_parameters: int, share: str) -> None:
    """specification 3 and 6: +4.99 % on Wan2.1-T2V-1.3B for gates and projections, 70,871,070 parameters."""
    from diffusers import WanTransformer3DModel

    kwargs: dict[str, Any] = {"attention_head_dim": 128, "text_dim": 4096}
    with torch.device("meta"):
        model = WanTransformer3DModel(num_attention_heads=12, num_layers=30, ffn_dim=8960, **kwargs)
    config = salad_compile.SaladConfig(compensation="none", **settings)  # which is not the paper's
    summary = salad_compile.summary(salad_compile.convert(model, config))
    assert summary.base_parameters == 1_418_996_800
    assert summary.branch_parameters == branch_parameters
    assert summary.lora_parameters == 23_592_960
    assert share in str(summary)
