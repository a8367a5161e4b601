"""The hand-written DiTs pass the same tests as the classes of diffusers."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from . import test_zoo
from .test_zoo import _fresh_dynamo  # noqa: F401  a fixture
from .zoo_handwritten import HANDWRITTEN_CASES

every_case = pytest.mark.parametrize("case", HANDWRITTEN_CASES.values(), ids=HANDWRITTEN_CASES.keys())


def _again(test: Any) -> Any:
    """A test of the zoo with these cases."""

    def run(*args: Any, **kwargs: Any) -> None:
        test(*args, **kwargs)

    run.__signature__ = __import__("inspect").signature(test)
    return run
