"""Other code in a function of somebody else, for as long as anybody needs it: how modes get to see its calls."""

from __future__ import annotations

import contextlib
import threading
import types
from collections.abc import Iterator
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

    @contextlib.contextmanager
    def hold(self, code: types.CodeType) -> Iterator[None]:
        """Inside, the function has this code: it must do for other threads what the original does."""
        with self._lock:
            self._users += 1
            self.function.__code__ = code
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    self.function.__code__ = self.original
