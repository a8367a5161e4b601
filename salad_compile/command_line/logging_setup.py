"""The package's log on stderr while a command runs."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator

from salad_compile.common.logs import logger


@contextlib.contextmanager
def logs_on_stderr() -> Iterator[None]:
    """Warnings always; what is going on only where somebody is watching. Afterwards the logger is as it was."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("salad-compile: %(levelname)s: %(message)s"))
    level = logger.level
    logger.addHandler(handler)
    if level == logging.NOTSET:  # otherwise TORCH_LOGS, or the user, chose
        logger.setLevel(logging.INFO if sys.stderr.isatty() else logging.WARNING)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
