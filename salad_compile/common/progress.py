"""A progress bar on stderr."""

from __future__ import annotations

import time
from types import TracebackType

REFRESH_SECONDS = 0.1


class ProgressBar:
    """A bar on stderr if that is a terminal, as a context manager. It needs no thread, so that processes may be forked.

    Args:
        what: stands before the bar. total: how many steps there are. done: how many of them are done before.
        shown: False shows none, on a terminal either.
    """

    def __init__(self, what: str, total: int, *, done: int = 0, shown: bool = True) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        columns = (
            *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()),
            TextColumn("{task.fields[note]}"),
        )
        shown = shown and console.is_terminal
        self._progress = Progress(*columns, console=console, transient=True, auto_refresh=False, disable=not shown)
        self._task = self._progress.add_task(what, total=total, completed=done, note="")
        self._refreshed = 0.0
        self._progress.start()

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """Move on by `count` steps. note: stands behind the bar from now on."""
        if note is not None:
            self._progress.update(self._task, note=note)
        self._progress.advance(self._task, count)
        if time.monotonic() - self._refreshed > REFRESH_SECONDS:
            self._progress.refresh()
            self._refreshed = time.monotonic()

    def close(self) -> None:
        """Take the bar away."""
        self._progress.stop()

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
