"""The comparison without training: its table is that of its rows, and its first-order term is one."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch

Load = Callable[[str], ModuleType]


def test_the_page_is_what_the_rows_say(load: Load) -> None:
    untrained = load("untrained")
    assert untrained.render(untrained._rows()) in untrained.PAGE.read_text(encoding="utf-8")


def test_the_first_order_term_follows_keys_that_differ_little(load: Load) -> None:
    """Keys near the mean of their block: the error of means is of first order in the distance, the rest of second."""
    untrained = load("untrained")
    draw = torch.Generator().manual_seed(0)
    query, near, value, centre = (torch.randn(1, 2, 200, 16, generator=draw, dtype=torch.float64) for _ in range(4))
    centres = centre[:, :, ::16].repeat_interleave(16, 2)[:, :, :200]
    errors: dict[str, list[float]] = {term: [] for term in untrained.TERMS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(untrained, "START_WEIGHT", 0.0)
        for distance in (0.1, 0.01):
            key = centres + distance * near
            dense = torch.nn.functional.scaled_dot_product_attention(query, key, value)
            for term in untrained.TERMS:
                out = untrained.attend(query, key, value, untrained.Way(16, 16, "topk", 16, term))
                errors[term].append(float((out - dense).norm()))
    means, of_block, of_query = (errors[term] for term in untrained.TERMS)
    assert means[0] / means[1] == pytest.approx(10, rel=0.2)
    assert of_query[0] / of_query[1] > 50
    assert of_query[0] < of_block[0] < means[0]
