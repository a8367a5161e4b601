"""How a site calls attention: one sample after another, other scales, other layouts, mixed dtypes under autocast."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import salad_compile
from salad_compile.discovery.discover import discover
from salad_compile.errors import SiteLostError
from salad_compile.kernels import measure_executions
from tests import toys
from tests.support import Recorder, assert_same, check_rewrite, randomise_branches, relative_error, run

CONFIG = salad_compile.SaladConfig(
    compensation="none", sparsity=0.6, query_block=16, key_block=16, lora_rank=2, min_tokens=64
)
DENSE_CONFIG = salad_compile.SaladConfig(
    compensation="none", sparsity=0.0, query_block=16, key_block=16, lora_rank=2, min_tokens=64
)


def convert(model: nn.Module, config: salad_compile.SaladConfig = CONFIG, *, randomise: bool = True) -> nn.Module:
    salad_compile.convert(model, config, example_inputs=(toys.tokens(),))
    if randomise:
        randomise_branches(model)
    return model


# --- one call for each sample ----------------------------------------------------------------------------------------


def one_by_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As Mochi, which attends to the valid tokens of one sample after another."""
    parts = [toys.positional(q[i : i + 1], k[i : i + 1], v[i : i + 1]) for i in range(q.shape[0])]
    return torch.cat(parts, dim=0)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_a_call_for_each_sample_equals_one_call_for_all(batch: int) -> None:
    x = toys.tokens(batch=batch)
    single, whole = toys.SelfAttention(one_by_one), toys.SelfAttention()
    whole.load_state_dict(single.state_dict())
    for model in (single, whole):
        salad_compile.convert(model, CONFIG, example_inputs=(x,))
        randomise_branches(model)
    with measure_executions() as executions:
        actual = run(single, {"x": x})
    assert len(executions) == batch
    assert_same(actual, run(whole, {"x": x}))
    recorder = Recorder({"lowering": "aot_eager"})
    torch._dynamo.reset()
    compiled = torch.compile(single, backend=recorder, fullgraph=True)
    assert_same(run(compiled, {"x": x}, parameters=single), actual)
    assert recorder.after["salad.block_sparse_attention"] == batch
    assert recorder.after["scaled_dot_product_attention"] == recorder.after["salad.tag"] == 0


def test_a_call_for_each_sample_is_one_site() -> None:
    model = toys.Stack(*(toys.SelfAttention(one_by_one) for _ in range(2)))
    discovery = discover(model, (toys.tokens(),), min_tokens=64)
    assert [(s.name, s.batch, s.query_tokens, s.invocations, s.eligible) for s in discovery.sites] == [
        ("layers.0", 1, 70, 2, True),
        ("layers.1", 1, 70, 2, True),
    ]


def test_samples_of_another_batch_than_at_conversion() -> None:
    model, dense = toys.SelfAttention(one_by_one), toys.SelfAttention()
    dense.load_state_dict(model.state_dict())
    salad_compile.convert(model, DENSE_CONFIG, example_inputs=(toys.tokens(),))
    for batch in (1, 4):
        x = toys.tokens(batch=batch)
        assert relative_error(model(x), dense(x)) < 1e-6
        compiled = torch.compile(model, backend="salad", options={"lowering": "eager"}, dynamic=False)
        assert relative_error(compiled(x), dense(x)) < 1e-6


def test_cross_attention_of_each_sample_is_not_taken_for_the_site() -> None:
    class Both(toys.SelfAttention):
        """Self-attention sample by sample, then cross-attention of as many tokens in the same forward."""

        def __init__(self) -> None:
            super().__init__(one_by_one)
            self.cross_q, self.cross_k, self.cross_v = (nn.Linear(toys.WIDTH, toys.WIDTH) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = x + super().forward(x)
            context = x.flip(1) * 1.5
            q, k, v = self.cross_q(x), self.cross_k(context), self.cross_v(context)
            return x + one_by_one(*(toys.heads(part) for part in (q, k, v))).transpose(1, 2).flatten(2)

    torch.manual_seed(1)
    dense = Both()
    torch.manual_seed(1)
    model = convert(Both(), DENSE_CONFIG, randomise=False)
    with measure_executions() as executions:
        assert relative_error(model(toys.tokens()), dense(toys.tokens())) < 1e-6
    assert len(executions) == 2


# --- scale and layout ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 0.05, 3])
def test_other_scales_are_kept(scale: float) -> None:
    def scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)

    dense, model = toys.SelfAttention(scaled), toys.SelfAttention(scaled)
    model.load_state_dict(dense.state_dict())
    convert(model, DENSE_CONFIG, randomise=False)
    x = toys.tokens() * 4
    assert relative_error(model(x), dense(x)) < 1e-6
    dense.attend = toys.positional
    assert relative_error(model(x), dense(x)) > 1e-3
    randomise_branches(model)
    check_rewrite(model, {"x": x}, sites=1)


def test_one_sample_without_a_batch_axis() -> None:
    def unbatched(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return toys.positional(q[0], k[0], v[0])[None]

    x = toys.tokens(batch=1)
    model, batched = toys.SelfAttention(unbatched), toys.SelfAttention()
    batched.load_state_dict(model.state_dict())
    for module in (model, batched):
        salad_compile.convert(module, CONFIG, example_inputs=(x,))
        randomise_branches(module)
    assert_same(run(model, {"x": x}), run(batched, {"x": x}))
    check_rewrite(model, {"x": x}, sites=1, lowering="aot_eager")


def test_video_in_more_dimensions() -> None:
    """The layer's input is (B, T, H, W, C) or (B * S, C): rows are rows."""

    class Shaped(toys.SelfAttention):
        shape: tuple[int, ...] = (2, 2, 5, 7, toys.WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            given = x.reshape(self.shape)
            q, k, v = (toys.heads(p(given).reshape(2, 70, toys.WIDTH)) for p in (self.q, self.k, self.v))
            result: Tensor = self.o(toys.positional(q, k, v).transpose(1, 2).flatten(2))
            return result

    expected = None
    for shape in ((2, 70, toys.WIDTH), (2, 2, 5, 7, toys.WIDTH), (140, toys.WIDTH)):
        torch.manual_seed(1)
        model = Shaped()
        model.shape = shape
        convert(model)
        actual = run(model, {"x": toys.tokens()})
        if expected is not None:
            assert_same(actual, expected)
        expected = actual
        check_rewrite(model, {"x": toys.tokens()}, sites=1)


# --- dtypes ----------------------------------------------------------------------------------------------------------


class Normed(toys.SelfAttention):
    """Norms of query and key answer fp32 whatever autocast says, and value stays in 16 bits."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (toys.heads(p(x)) for p in (self.q, self.k, self.v))
        q, k = (F.layer_norm(part, (8,)) for part in (q, k))
        result: Tensor = self.o(toys.positional(q, k, v).transpose(1, 2).flatten(2))
        return result


def autocast(model: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The forward under autocast, and the backward outside of it, as torch recommends."""

    def forward(**inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(**inputs)

    return forward


@pytest.mark.parametrize("kind", [toys.SelfAttention, Normed])
@pytest.mark.parametrize(("parameters", "branch"), list(itertools.product([torch.float32, torch.bfloat16], repeat=2)))
def test_autocast_mixes(kind: type[toys.SelfAttention], parameters: torch.dtype, branch: torch.dtype) -> None:
    """Under autocast: base and branch in 16 or 32 bits each, and operands of different dtypes. Sparsity 0, since a
    last digit of 16 bits may decide which of two near blocks is selected."""
    torch.manual_seed(1)
    exact = kind()
    torch.manual_seed(1)
    model = kind()
    for module in (exact, model):
        convert(module, DENSE_CONFIG)
    model.to(parameters)
    model.salad.to(branch)
    x = toys.tokens().to(parameters)
    expected = run(autocast(model), {"x": x}, parameters=model)
    assert expected.output.dtype == torch.bfloat16
    assert relative_error(expected.output, exact(toys.tokens())) < 3e-2
    recorder = Recorder()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=recorder, fullgraph=True)
    actual = run(autocast(compiled), {"x": x}, parameters=model)
    assert recorder.after["salad.block_sparse_attention"] == 1
    assert actual.output.dtype == torch.bfloat16
    assert relative_error(actual.output, expected.output) < 1e-2
    assert actual.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        assert actual.gradients[name].dtype == gradient.dtype
        assert relative_error(actual.gradients[name], gradient) < 3e-2, name


def test_backward_inside_autocast() -> None:
    """Not recommended by torch, and common: `with autocast: loss(model(x)).backward()`."""
    model = convert(toys.SelfAttention(), DENSE_CONFIG)
    expected = run(autocast(model), {"x": toys.tokens()}, parameters=model)
    with torch.autocast("cpu", torch.bfloat16):
        actual = run(model, {"x": toys.tokens()})
    assert_same(actual, expected, bound=1e-2, gradient_bound=3e-2)


def test_a_wholly_16_bit_model_without_autocast() -> None:
    model = convert(toys.SelfAttention(), DENSE_CONFIG).to(torch.bfloat16)
    x = toys.tokens().to(torch.bfloat16)
    recorder = Recorder()
    out = torch.compile(model, backend=recorder, fullgraph=True)(x)
    assert out.dtype == model(x).dtype == torch.bfloat16
    assert relative_error(out, model(x)) < 1e-2
    assert model.salad.low_rank_scale.dtype == torch.bfloat16  # `to` moves it; the update is scaled all the same


def test_double_precision() -> None:
    model = convert(toys.SelfAttention()).double()
    x = toys.tokens().double()
    expected = run(model, {"x": x})
    assert expected.output.dtype == torch.float64
    compiled = torch.compile(model, backend="salad", options={"lowering": "aot_eager"}, fullgraph=True)
    assert_same(run(compiled, {"x": x}, parameters=model), expected, bound=1e-12, gradient_bound=1e-12)


# --- calls that another library makes --------------------------------------------------------------------------------


def test_a_second_call_that_comes_before_the_site() -> None:
    """The site is the call that reads its query, even where an earlier call of the same forward appears later on."""

    class Sometimes(toys.SelfAttention):
        early = False

        def forward(self, x: Tensor) -> Tensor:
            if self.early:
                x = x + toys.positional(x[:, None], x[:, None], x[:, None])[:, 0]
            return super().forward(x)

    model = convert(Sometimes())
    assert model(toys.tokens()).isfinite().all()
    model.early = True
    with pytest.raises(SiteLostError, match="none was call number 0"):
        model(toys.tokens())


def test_the_output_projection_may_be_missing() -> None:
    class Bare(toys.SelfAttention):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (toys.heads(p(x)) for p in (self.q, self.k, self.v))
            return toys.positional(q, k, v).transpose(1, 2).flatten(2)

    model: Any = convert(Bare())
    assert model.salad.record.out is None
    assert model.salad.lora_roles == ("query", "key", "value")
    check_rewrite(model, {"x": toys.tokens()}, sites=1)


# --- what a site may meet --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True])
def test_a_batch_of_no_samples_is_an_error_that_says_so(compiled: bool) -> None:
    model = convert(toys.SelfAttention())
    torch._dynamo.reset()
    called = torch.compile(model, backend=Recorder()) if compiled else model
    with pytest.raises(SiteLostError, match="it has no samples"):
        called(toys.tokens(batch=0))


def test_a_converted_model_says_its_shapes_on_the_meta_device() -> None:
    model = convert(toys.SelfAttention(), DENSE_CONFIG).to("meta")
    assert model(toys.tokens().to("meta")).shape == toys.tokens().shape


def test_a_projection_may_be_exchanged_with_its_hooks() -> None:
    """torch.ao.quantization registers the hooks of a module that it exchanges anew, as hooks without keywords."""
    model = convert(toys.SelfAttention())
    expected = run(model, {"x": toys.tokens()})
    for name in ("q", "k", "v", "o"):
        linear = nn.Linear(toys.WIDTH, toys.WIDTH)
        before = getattr(model, name)
        linear.load_state_dict(before.state_dict())
        linear.requires_grad_(before.weight.requires_grad)
        for hook in before._forward_hooks.values():
            linear.register_forward_hook(hook)
        setattr(model, name, linear)
    assert_same(run(model, {"x": toys.tokens()}), expected)
    check_rewrite(model, {"x": toys.tokens()}, sites=1)


@pytest.mark.parametrize(
    ("attend", "reason"),
    [
        (lambda q, k, v: F.scaled_dot_product_attention(q, k[:1], v[:1]), "its queries are of 2 samples, keys of 1"),
        (lambda q, k, v: (q[:1] @ k.mT).softmax(-1) @ v, "its queries are of 1 samples, keys of 2"),
        (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, q.new_ones(2, 1, 1, 1).bool()), "or of one key"),
        (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, q.new_ones(1, 1, 70, 1).bool()), "or of one key"),
    ],
)
@pytest.mark.parametrize("batch", [1, 2])
def test_what_is_broadcast_stays_dense_or_is_an_error(attend: toys.Attend, reason: str, batch: int) -> None:
    model = toys.SelfAttention(attend)
    (site,) = discover(model, (toys.tokens(),), min_tokens=64).sites
    assert reason in site.reason
    torch._dynamo.reset()
    recorder = Recorder({"lowering": "eager", "min_tokens": 64})
    inputs = toys.tokens(batch=batch)
    if batch == 2:  # never converted
        torch.testing.assert_close(torch.compile(model, backend=recorder)(inputs), model(inputs))
        assert not recorder.after["salad.block_sparse_attention"]
    elif "samples" in reason:  # with one sample at conversion nothing tells
        salad_compile.convert(model, CONFIG, example_inputs=(inputs,))
        with pytest.raises(SiteLostError, match=reason):
            model(toys.tokens())
