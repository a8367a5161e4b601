"""Orders of joint models are made once, and serve every later call."""

from __future__ import annotations

import pytest
import torch

from salad_compile.definition.token_layout import arrange_all, reordering


@pytest.mark.parametrize("text", ["after", "before"])
def test_an_order_made_in_inference_mode_serves_training(text: str) -> None:
    """As where a model is sampled from uncompiled, and then trained."""
    shuffled = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    order = torch.stack([shuffled, shuffled.argsort()]).int()
    with torch.inference_mode():
        reordering(order, text, 9)
        arrange_all(order, text, 9, 6).move(torch.randn(1, 2, 9, 4))
    query = torch.randn(1, 2, 9, 4, requires_grad=True)
    moved = arrange_all(order, text, 9, 6).move(query)
    weight = torch.randn(1, 2, 9, 4)
    (moved * weight).sum().backward()
    assert query.grad is not None
    torch.testing.assert_close(arrange_all(order, text, 9, 6).move(query.grad), weight)
