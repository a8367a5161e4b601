"""Most tests are of short sequences, and most of what the plain-torch engine does is for long ones."""

import pytest

from salad_compile.kernels.block_sparse import whole


@pytest.fixture(autouse=True)
def _gathering(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine gathers blocks, whatever the length; test_whole.py says otherwise."""
    monkeypatch.setattr(whole, "_MOST_PAIRS", 0)
