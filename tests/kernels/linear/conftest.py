"""Most tests are of few tokens, and most of what the plain-torch engine does is for many."""

import pytest

from salad_compile.kernels.linear import torch as engine


@pytest.fixture(autouse=True)
def _several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this folder several chunks are made of most inputs."""
    monkeypatch.setattr(engine, "_CHUNK_ELEMENTS", 1 << 12)
