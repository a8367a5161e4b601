"""Facts about torch on which matching rests, and the binding of arguments."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from salad_compile.calls.adapters import AttentionArguments, bind, default_scale, is_attention


def test_dynamo_uses_the_functional_object_as_target() -> None:
    assert F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention
    assert is_attention(F.scaled_dot_product_attention)


def test_arguments_are_bound_from_any_mix() -> None:
    schema = torch.ops.aten.scaled_dot_product_attention.default._schema
    names = [argument.name for argument in schema.arguments]
    assert sorted(names) == sorted(list(AttentionArguments.__dataclass_fields__)[: len(names)])
    sdpa = F.scaled_dot_product_attention
    bound = bind(sdpa, ("q", "k"), {"value": "v", "scale": 2.0}, lambda _: 4)
    assert bound == AttentionArguments("q", "k", "v", None, 0.0, False, 2.0, False)
    assert bind(sdpa, ("q", "k", "v", "mask", 0.1, True), {}, lambda _: 4).is_causal is True
    assert bind(sdpa, ("q", "k", "v"), {}, lambda _: 3).layout == "HSD"


@pytest.mark.parametrize(
    ("layout", "shape"), [("BHSD", (2, 3, 7, 5)), ("BSHD", (2, 7, 3, 5)), ("HSD", (3, 7, 5)), ("SHD", (14, 3, 5))]
)
def test_layouts_are_undone_and_redone(layout: str, shape: tuple[int, ...]) -> None:
    batch = torch.tensor([0, 7, 14]) if layout == "SHD" else None
    call = AttentionArguments(None, None, None, layout=layout, batch=batch)
    tensor = torch.randn(shape)
    inside = call.heads_first(tensor)
    samples = 1 if layout == "HSD" else 2
    assert inside.shape == (samples, 3, 7, 5) == call.shape(shape, samples)
    assert torch.equal(call.as_called(inside), tensor)


def test_default_scale_is_torchs() -> None:
    q, k, v = torch.randn(3, 1, 1, 5, 12).unbind(0)
    by_hand = (q @ k.transpose(-1, -2) * default_scale(12)).softmax(-1) @ v
    assert torch.allclose(F.scaled_dot_product_attention(q, k, v), by_hand, atol=1e-6)
