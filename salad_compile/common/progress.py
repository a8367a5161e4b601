"""Progress on stderr: a bar on a terminal, a line from time to time elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from types import TracebackType

from salad_compile.common.printable import printable

REFRESH_SECONDS = 0.1
LINE_SECONDS = 60.0

_quiet = False

Tell = Callable[[int, int], object]  # how many parts of something are done, and of how many


def untold(done: int, total: int) -> None:
    """Tell nobody."""


@contextlib.contextmanager
def quiet(wanted: bool) -> Iterator[None]:
    """While entered, nothing shows progress, if that is wanted."""
    global _quiet
    before, _quiet = _quiet, wanted
    try:
        yield
    finally:
        _quiet = before


class ProgressBar:
    """A bar on stderr if that is a terminal, else a line a minute, as a context manager.

    It needs no thread, so that processes may be forked. What is written to `sys.stderr` meanwhile goes above the bar.

    Args:
        what: stands before the bar. total: how many steps there are. done: how many of them are done before.
        shown: False shows nothing. every: without a terminal, steps between lines, beside one a minute; 0: none.
    """

    def __init__(self, what: str, total: int, *, done: int = 0, shown: bool = True, every: int = 0) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        columns = (
            *(TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()),
            TextColumn("{task.fields[note]}", markup=False),
        )
        shown = shown and not _quiet
        self._shown, self._lines, self._every = shown, shown and not console.is_terminal, every
        what = printable(what)
        self._what, self._total, self._first, self._done, self._note = what, total, done, done, ""
        self._began = self._said = time.monotonic()
        shown = shown and console.is_terminal
        self._progress = Progress(*columns, console=console, transient=True, auto_refresh=False, disable=not shown)
        self._task = self._progress.add_task(what, total=total, completed=done, note="")
        self._refreshed = 0.0
        self._progress.start()

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """Move on by `count` steps; 0: something else is under way. note: stands behind the bar from now on."""
        self._done += count
        if self._done > self._total:  # more was needed than was foreseen
            self._total = self._done
            self._progress.update(self._task, total=self._total)
        if note is not None:
            self._note = printable(note)
            self._progress.update(self._task, note=self._note)
        self._progress.advance(self._task, count)
        if time.monotonic() - self._refreshed > REFRESH_SECONDS:
            self._progress.refresh()
            self._refreshed = time.monotonic()

        due = self._every and self._done // self._every > (self._done - count) // self._every
        if self._lines and (due or time.monotonic() - self._said >= LINE_SECONDS):
            self._say()

    def _say(self) -> None:
        """One line: what, how far, the note, and how long it will take at the pace so far."""
        self._said = time.monotonic()
        pace = (self._said - self._began) / max(self._done - self._first, 1)
        left = round(pace * (self._total - self._done))
        hours, minutes, seconds = left // 3600, left // 60 % 60, left % 60
        note = f", {self._note}" if self._note else ""
        time_left = f", {hours}:{minutes:02}:{seconds:02} left" if self._done > self._first else ""  # else unknown
        print(f"{self._what}: {self._done}/{self._total}{note}{time_left}", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A line of its own on stderr, above the bar."""
        if self._shown:
            print(printable(text), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Take the bar away."""
        self._progress.stop()

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
