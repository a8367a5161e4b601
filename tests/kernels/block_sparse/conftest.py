"""Most tests are of short sequences, and most of what the plain-torch engine does is for long ones."""

import pytest


@pytest.fixture(autouse=True)
def _gathering(gathering: None, request: pytest.FixtureRequest) -> None:
    """In this folder blocks are gathered, whatever the length; test_whole.py says otherwise."""
