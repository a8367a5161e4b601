"""plan() says which settings closed more of the gap, at lengths that were measured and at no others."""

from __future__ import annotations

import pytest

import salad_compile
from salad_compile.config import SaladConfig
from salad_compile.discovery.advice import MEASURED_TOKENS, advice
from tests import toys


@pytest.mark.parametrize(
    ("tokens", "settings", "said"),
    [
        (4_096, {}, "query_block=64"),
        (MEASURED_TOKENS, {}, "query_block=64"),
        (4_096, {"query_block": 64}, 'pattern="error8"'),
        (MEASURED_TOKENS + 1, {}, ""),
        (75_600, {}, ""),
        (4_096, {"pattern": "error8"}, ""),
        (4_096, {"compensation": "none"}, ""),
    ],
)
def test_advice_by_length(tokens: int, settings: dict[str, object], said: str) -> None:
    found = advice(SaladConfig(**settings), [100, tokens])  # type: ignore[arg-type]
    assert bool(found) == bool(said)
    assert all(said in line and f"{tokens:,} tokens" in line for line in found)
    assert advice(SaladConfig(), []) == []


def test_the_plan_says_it_of_what_would_be_converted() -> None:
    model, inputs = toys.SelfAttention(toys.positional), (toys.tokens(105),)
    for smallest, said in ((64, True), (8192, False)):
        plan = salad_compile.plan(model, inputs, config=SaladConfig(min_tokens=smallest), grid=(3, 5, 7))
        assert ("At 105 tokens smaller query blocks" in plan.to_text()) == said
