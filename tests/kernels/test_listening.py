"""Contexts that enter a list and leave it again, whatever else is in it."""

from __future__ import annotations

import pytest

from salad_compile.kernels.listening import listen


def test_equal_listeners_are_told_apart() -> None:
    listeners: list[list[int]] = []
    with listen(listeners, []) as outer:
        with listen(listeners, []) as inner:
            assert listeners[0] is outer
            assert listeners[1] is inner
        (left,) = listeners
        assert left is outer
    assert listeners == []


def test_it_leaves_after_an_error() -> None:
    listeners: list[list[int]] = []
    with pytest.raises(KeyError), listen(listeners, []):
        raise KeyError
    assert listeners == []
