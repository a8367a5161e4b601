"""Packages of other projects from a folder of their own, where `make test-composition` has put them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import torch

from tools.composition import SITE

# cache-dit writes a line for each block
os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")


@pytest.fixture(autouse=True)
def _packages_and_a_fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    if SITE.is_dir() and str(SITE) not in sys.path:
        sys.path.append(str(SITE))
    yield
    torch._dynamo.reset()
