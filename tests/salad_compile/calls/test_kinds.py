"""Which kind of call a site makes, and that nothing is armed for kinds that it does not make."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

import salad_compile
from salad_compile.calls.adapters import AttentionArguments
from salad_compile.calls.kinds import CallKind, kind_among, kind_of
from tests import toys
from tests.passes import rotary_styles as styles

PLAIN = AttentionArguments(None, None, None)
BY_HAND = AttentionArguments(None, None, None, by_hand=True)


@pytest.mark.parametrize(
    ("target", "arguments", "kind"),
    [
        (F.scaled_dot_product_attention, PLAIN, "sdpa"),
        (torch.ops.aten.scaled_dot_product_attention.default, PLAIN, "sdpa"),
        (flex_attention, PLAIN, "flex"),
        (torch.softmax, BY_HAND, "products"),
        (print, PLAIN, "adapter"),
    ],
)
def test_the_kind_of_a_call(target: Any, arguments: AttentionArguments, kind: CallKind) -> None:
    assert kind_of(target, arguments) == kind


@pytest.mark.parametrize(
    ("kind", "others", "among"),
    [
        ("sdpa", [], "sdpa"),
        ("sdpa", ["sdpa", "adapter"], "sdpa"),  # both are found by name
        ("adapter", ["sdpa"], "adapter"),
        ("sdpa", ["flex"], ""),
        ("flex", ["flex"], "flex"),
        ("flex", ["sdpa"], ""),
        ("products", ["products"], "products"),
        ("products", ["sdpa"], ""),
        ("sdpa", [""], ""),
    ],
)
def test_a_kind_counts_only_where_looking_for_it_alone_finds_every_call(
    kind: CallKind, others: list[CallKind], among: CallKind
) -> None:
    assert kind_among(kind, others) == among


def test_calls_of_flex_attention_are_seen_in_a_forward_of_a_site_that_called_sdpa_and_only_then() -> None:
    # an attention backend may be chosen after conversion
    config = salad_compile.SaladConfig(compensation="none", sparsity=0.5, query_block=16, key_block=16, min_tokens=64)
    model = salad_compile.convert(styles.Halves(), config, example_inputs=(toys.tokens(),))
    (record,) = [branch.record for branch in model.modules() if hasattr(branch, "record")]
    assert record.call == "sdpa"
    code = flex_attention.__code__
    seen: list[Any] = []
    for module in model.modules():
        module.register_forward_hook(lambda *_: seen.append(flex_attention.__code__))
    model(toys.tokens())
    assert any(each is not code for each in seen)
    assert flex_attention.__code__ is code
