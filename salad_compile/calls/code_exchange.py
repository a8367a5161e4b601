"""Other code in a function of somebody else, for as long as anybody needs it: how modes get to see its calls."""

from __future__ import annotations

import threading
import types
from typing import Any


class CodeExchange:
    """One function whose code is exchanged while contexts are open, in whatever threads they are.

    Whoever imported the function has the same object, so that its code is all that can be exchanged.

    Args:
        function: of Python, with the code that it was written with.
    """

    def __init__(self, function: Any) -> None:
        self.function = function
        self.original: types.CodeType = function.__code__
        self._lock = threading.Lock()
        self._users = 0

    def hold(self, code: types.CodeType) -> Held:
        """A context: inside, the function has this code. It must do for other threads what the original does."""
        return Held(self, code)

    def begin(self, code: types.CodeType) -> None:
        """One more needs this code."""
        with self._lock:
            self._users += 1
            self.function.__code__ = code

    def end(self) -> None:
        """One fewer does."""
        with self._lock:
            self._users -= 1
            if not self._users:
                self.function.__code__ = self.original


class Held:
    """One use of a :class:`CodeExchange`; a class because a generator takes three times as long."""

    def __init__(self, exchange: CodeExchange, code: types.CodeType) -> None:
        self._exchange, self._code = exchange, code

    def __enter__(self) -> None:
        self._exchange.begin(self._code)

    def __exit__(self, *error: object) -> None:
        self._exchange.end()
