"""Other code in a function while somebody needs it."""

from __future__ import annotations

import pytest

from salad_compile.calls.code_exchange import CodeExchange


def answer() -> int:
    return 1


def other() -> int:
    return 2


def test_the_last_to_leave_puts_the_code_back_also_after_an_error() -> None:
    exchange = CodeExchange(answer)
    with exchange.hold(other.__code__):
        with pytest.raises(RuntimeError), exchange.hold(other.__code__):
            raise RuntimeError
        assert answer() == 2
    assert answer() == 1
