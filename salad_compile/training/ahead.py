"""Ahead: what comes next is made in a thread, while the device works on what came before."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Generic, TypeVar

import torch

from salad_compile.training.flow_matching import Noised

T = TypeVar("T")

HOST = torch.device("cpu")
DEPTH = 2

_POLL_SECONDS = 0.05
_END = object()


def ahead(batches: Iterator[Noised], device: torch.device) -> Ahead[Noised]:
    """Batches on the host, made in a thread, in memory that the device copies from by itself."""
    if device.type != "cuda":
        return Ahead(batches, DEPTH)
    pinned = (batch.pin() for batch in batches)
    # each thread has a current device of its own; "cuda" alone, as accelerate says it, is that of the caller
    number = torch.cuda.current_device() if device.index is None else device.index
    return Ahead(pinned, DEPTH, lambda: torch.cuda.set_device(number))


class Ahead(Generic[T]):
    """An iterator over the values of another one, in their order, which are made in a thread of their own.

    Use it as a context manager: its end ends the thread, which holds no more of the values.

    Args:
        values: taken in that thread alone. What it raises is raised where the value is asked for.
        depth: values that are ready before they are asked for, beside the one in the making.
        begin: called in the thread before the first value.
    """

    def __init__(self, values: Iterator[T], depth: int, begin: Callable[[], object] = lambda: None) -> None:
        self._ready: queue.Queue[object] = queue.Queue(depth)
        self._closed = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._make, args=(values, begin), daemon=True)

    def __enter__(self) -> Ahead[T]:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._closed.set()
        self._thread.join()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        found = self._ready.get()
        if found is not _END:
            return found  # type: ignore[return-value]
        self._ready.put(_END)  # for whoever asks again
        if self._failure is not None:
            raise self._failure
        raise StopIteration

    def _make(self, values: Iterator[T], begin: Callable[[], object]) -> None:
        try:
            begin()
            for value in values:
                if not self._put(value):
                    return
        except BaseException as error:
            self._failure = error
        self._put(_END)

    def _put(self, value: object) -> bool:
        """Whether it is still wanted."""
        while not self._closed.is_set():
            try:
                self._ready.put(value, timeout=_POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False
