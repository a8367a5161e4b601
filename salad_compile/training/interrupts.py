"""SIGTERM and SIGINT during a run: the step is finished and a checkpoint written, then the run ends."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from salad_compile.common.logs import logger

SIGNALS = (signal.SIGTERM, signal.SIGINT)

# Launchers pass on what the terminal or the scheduler has sent to every process already: twice at once is one request.
SAME_REQUEST_SECONDS = 3.0


class StopRequest:
    """While entered, the first such signal is remembered; a later one has its usual effect.

    Outside the main thread, where Python allows no handlers, signals have their usual effect.
    """

    def __init__(self) -> None:
        self.number = 0  # of the signal, 0: none came
        self._when = 0.0
        self._process = os.getpid()
        self._before: dict[int, Any] = {}

    @property
    def asked(self) -> bool:
        """Whether a signal came."""
        return self.number != 0

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._remember) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a process that reads ahead: the training process ends it
        if not self.number:
            self.number, self._when = number, time.monotonic()
            logger.warning("%s: after this step the run writes a checkpoint and ends", signal.Signals(number).name)
        elif time.monotonic() - self._when > SAME_REQUEST_SECONDS:
            signal.signal(number, self._before[number])
            signal.raise_signal(signal.Signals(number))
