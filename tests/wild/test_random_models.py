"""A few of the random models; `python -m tests.wild.random_models --count 300` runs many."""

from __future__ import annotations

import pytest

from tests.wild.random_dits import style_of
from tests.wild.random_models import check


@pytest.mark.parametrize("seed", range(20))
def test_right_or_refused_with_a_reason(seed: int) -> None:
    said = check(style_of(seed), compiled=seed % 5 == 0)
    assert said == "right" or said.startswith(("refused: ", "at run: "))
