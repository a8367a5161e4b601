"""nn.MultiheadAttention: taken apart while discovery runs and in converted models, and else left alone."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor

import salad_compile
from salad_compile.errors import MergeError, SiteLostError
from tests.models.zoo_handwritten import HANDWRITTEN_CASES
from tests.salad_compile.conversion.test_convert import assert_unchanged, fingerprint
from tests.support import TINY, Recorder, assert_same, randomise_branches, run

DENSE_AT_ZERO = salad_compile.SaladConfig(
    compensation="none", sparsity=0.0, query_block=32, key_block=16, min_tokens=90
)
TOKENS = 100


class Layer(nn.Module):
    """Calls its attention with whatever the test says."""

    def __init__(self, attention: nn.MultiheadAttention | None = None, **call: Any) -> None:
        super().__init__()
        self.attention = attention or nn.MultiheadAttention(16, 2, batch_first=True)
        self.call = {"need_weights": False, **call}

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        out: Tensor = self.attention(x, x, x, key_padding_mask=padding, **self.call)[0]
        return out


class Cross(Layer):
    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        out: Tensor = self.attention(x, x.flip(1), x.flip(1), need_weights=False)[0]
        return out


class Positions(Layer):
    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        rotated = x * 2
        out: Tensor = self.attention(rotated, rotated, x, need_weights=False)[0]
        return out


def x(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, TOKENS, 16)), generator=torch.Generator().manual_seed(0))


def biased(module: nn.Module) -> nn.Module:
    """Biases are zero at first."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.normal_()
    return module


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("padded", [False, True])
def test_sparsity_zero_is_dense(batch_first: bool, bias: bool, padded: bool) -> None:
    model = biased(Layer(nn.MultiheadAttention(16, 2, bias=bias, batch_first=batch_first)))
    padding = torch.arange(TOKENS)[None] >= torch.tensor([[70], [TOKENS]]) if padded else None
    inputs = {"x": x() if batch_first else x().transpose(0, 1), "padding": padding}
    expected = model(**inputs)
    converted = salad_compile.convert(model, DENSE_AT_ZERO, example_inputs=inputs)
    out = converted(**inputs)
    if not batch_first:
        out, expected = out.transpose(0, 1), expected.transpose(0, 1)
    valid = ~padding if padding is not None else torch.ones(2, TOKENS, dtype=torch.bool)
    torch.testing.assert_close(out[valid], expected[valid], atol=1e-5, rtol=1e-4)


def test_unbatched() -> None:
    model = biased(Layer())
    expected = model(x(TOKENS, 16))
    converted = salad_compile.convert(model, DENSE_AT_ZERO, example_inputs=(x(TOKENS, 16),))
    torch.testing.assert_close(converted(x(TOKENS, 16)), expected, atol=1e-5, rtol=1e-4)


def test_key_padding_compiled() -> None:
    padding = torch.arange(TOKENS)[None] >= torch.tensor([[70], [TOKENS]])
    inputs = {"x": x(), "padding": padding}
    model = salad_compile.convert(Layer(), TINY, example_inputs=inputs)
    randomise_branches(model)
    recorder = Recorder()
    expected = run(model, inputs)
    compiled = torch.compile(model, backend=recorder, fullgraph=True)
    assert_same(run(compiled, inputs, parameters=model), expected)
    assert recorder.after["salad.block_sparse_attention"] == 1


STAYS_DENSE: dict[str, tuple[nn.Module, str]] = {
    "weights": (Layer(need_weights=True), "need_weights=False"),
    "mask": (Layer(attn_mask=torch.zeros(TOKENS, TOKENS, dtype=torch.bool)), "no key-padding mask"),
    "own keys": (Layer(nn.MultiheadAttention(16, 2, batch_first=True, add_bias_kv=True)), "keys of its own"),
    "cross": (Cross(), "cross-attention"),
    "positions": (Positions(), "different tensors"),
}


@pytest.mark.parametrize(("model", "reason"), STAYS_DENSE.values(), ids=STAYS_DENSE.keys())
def test_what_stays_dense_says_why(model: nn.Module, reason: str) -> None:
    before = fingerprint(model)
    plan = salad_compile.plan(model, (x(),), config=TINY)
    assert [site.eligible for site in plan.sites[""]] == [False]
    assert reason in plan.sites[""][0].reason
    assert_unchanged(model, before)
    recorder = Recorder()
    torch.compile(model, backend=recorder, fullgraph=True)(x())
    assert recorder.after["salad.block_sparse_attention"] == 0


def test_other_widths_are_reported() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True, kdim=8, vdim=12)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.attention(x, x[..., :8], x[..., :12], need_weights=False)[0]
            return out

    plan = salad_compile.plan(Wide(), (x(),), config=TINY)
    assert [site.eligible for site in plan.sites[""]] == [False]


def test_keys_of_the_state_dict_stay_and_the_plan_changes_nothing() -> None:
    model = Layer()
    before, names = fingerprint(model), [name for name, _ in model.named_modules()]
    keys = list(model.state_dict())
    plan = salad_compile.plan(model, (x(),), config=TINY)
    assert plan.eligible[0].query == ("attention.in_projection",)
    assert_unchanged(model, before)
    assert [name for name, _ in model.named_modules()] == names
    assert "forward" not in model.attention.__dict__
    salad_compile.convert(model, TINY, example_inputs=(x(),))
    assert [key for key in model.state_dict() if ".salad." not in key] == keys


def test_a_converted_site_that_asks_for_weights_is_lost() -> None:
    model = salad_compile.convert(Layer(), TINY, example_inputs=(x(),))
    model.call["need_weights"] = True
    with pytest.raises(SiteLostError):
        model(x())


def test_copies_and_pickles_run_like_the_model() -> None:
    model = salad_compile.convert(Layer(), TINY, example_inputs=(x(),))
    randomise_branches(model)
    expected = model(x())
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for other in copies:
        assert torch.equal(other(x()), expected)


def test_the_fast_path_of_an_encoder_layer_does_not_pass_a_converted_site_by() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True).eval()
    expected = layer(x())
    converted = salad_compile.convert(layer, TINY, example_inputs=(x(),))
    with torch.no_grad():
        out = converted(x())
    assert (out - expected).abs().max() > 1e-3


def test_merging_is_refused_and_changes_nothing() -> None:
    case = HANDWRITTEN_CASES["handwritten_multihead"]
    model = salad_compile.convert(case.build(), TINY, example_inputs=case.inputs(0))
    before = fingerprint(model)
    with pytest.raises(MergeError, match="in_projection"):
        salad_compile.merge_lora(model)
    assert_unchanged(model, before)
