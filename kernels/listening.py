"""Who listens just now: lists that contexts enter and leave."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def listen(listeners: list[T], one: T) -> Iterator[T]:
    """While active, `one` is among the listeners. Contexts nest, and may close in any order."""
    listeners.append(one)
    try:
        yield one
    finally:
        # by identity: two empty lists are equal
        listeners[:] = [entry for entry in listeners if entry is not one]
