"""The package's log on stderr while a command runs."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator

from salad_compile.common.logs import logger
from salad_compile.common.printable import printable


class _Stderr(logging.Handler):
    """Writes to what `sys.stderr` is at that moment: while a bar is shown, that is what writes above it."""

    def emit(self, record: logging.LogRecord) -> None:
        print(printable(self.format(record)), file=sys.stderr, flush=True)


@contextlib.contextmanager
def logs_on_stderr(*, verbose: bool = False, silent: bool = False) -> Iterator[None]:
    """Warnings always; what is going on only where somebody is watching. Afterwards the logger is as it was.

    verbose: what is going on, always. silent: warnings alone, always.
    """
    handler = _Stderr()
    handler.setFormatter(logging.Formatter("salad-compile: %(levelname)s: %(message)s"))
    level = logger.level
    logger.addHandler(handler)
    if verbose or silent or level == logging.NOTSET:  # otherwise TORCH_LOGS, or the user, chose
        watched = verbose or (sys.stderr.isatty() and not silent)
        logger.setLevel(logging.INFO if watched else logging.WARNING)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
