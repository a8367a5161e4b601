"""SIGTERM, SIGINT and SIGHUP during a run: the step is finished and a checkpoint written, then the run ends."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from salad_compile.common.logs import logger

HANGUP: signal.Signals | None = getattr(signal, "SIGHUP", None)  # a terminal was closed; Windows has none
SIGNALS = (signal.SIGTERM, signal.SIGINT, *(() if HANGUP is None else (HANGUP,)))

# Launchers pass on what the terminal or the scheduler has sent to every process already: twice at once is one request.
SAME_REQUEST_SECONDS = 3.0


def signals_to_handle() -> list[signal.Signals]:
    """Those of SIGNALS that mean this process: under nohup no hangup does."""
    return [number for number in SIGNALS if number != HANGUP or signal.getsignal(number) is not signal.SIG_IGN]


class Terminal:
    """The terminal that stdout and stderr of this process are, if they are one.

    Once it is closed, whatever is written to it raises, and it can no longer be told from a file.
    """

    def __init__(self) -> None:
        self._descriptors = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]

    def leave(self) -> None:
        """What is said from now on goes nowhere."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in self._descriptors:
            os.dup2(nowhere, descriptor)
        os.close(nowhere)


class StopRequest:
    """While entered, the first such signal is remembered; a later one has its usual effect.

    Outside the main thread, where Python allows no handlers, signals have their usual effect.
    """

    def __init__(self) -> None:
        self.number = 0  # of the signal, 0: none came
        self._when = 0.0
        self._process = os.getpid()
        self._terminal = Terminal()
        self._before: dict[int, Any] = {}

    @property
    def asked(self) -> bool:
        """Whether a signal came."""
        return self.number != 0

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._remember) for number in signals_to_handle()}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a process that reads ahead: the training process ends it
        if number == HANGUP:
            self._terminal.leave()
        if not self.number:
            self.number, self._when = number, time.monotonic()
            logger.warning("%s: after this step the run writes a checkpoint and ends", signal.Signals(number).name)
        elif time.monotonic() - self._when > SAME_REQUEST_SECONDS:
            signal.signal(number, self._before[number])
            signal.raise_signal(signal.Signals(number))
