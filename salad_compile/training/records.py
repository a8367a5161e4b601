"""Records of a run: the log that is always written, accelerate's trackers, progress on stderr."""

from __future__ import annotations

import json
import os
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch

from salad_compile.common.checks import is_int
from salad_compile.common.files import name_failures, write_at_once
from salad_compile.common.logs import logger
from salad_compile.common.progress import ProgressBar
from salad_compile.errors import MissingPackageError

LOG_FILE = "log.jsonl"


def read_log(directory: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a run's log, in order.

    What is no line of a log is left out: a last one that a killed run left unfinished, and what a loss of power left of
    lines after the last checkpoint.
    """
    path = Path(directory) / LOG_FILE
    if not path.exists():
        return []
    whole = path.read_bytes().rpartition(b"\n")[0]
    found = [_line(text) for text in whole.split(b"\n")]
    damaged = sum(line is None and bool(text) for line, text in zip(found, whole.split(b"\n"), strict=True))
    if damaged:
        logger.warning("%s: %d damaged lines are left out", path, damaged)
    return [line for line in found if line is not None]


def _line(text: bytes) -> dict[str, Any] | None:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) and is_int(values.get("step")) else None


class RunLog:
    """`log.jsonl`: one JSON object a line, appended with one write each. A killed run can leave half of its last one.

    A resumed run drops what was logged after its checkpoint, so that the curve is that of an uninterrupted run.
    Lines are on the disk before the next checkpoint is: a loss of power costs those after the last one.

    Args:
        directory: of the run. step: of the checkpoint from which it resumes; 0: from the beginning.
    """

    def __init__(self, directory: Path, step: int) -> None:
        self.path = directory / LOG_FILE
        kept = [line for line in read_log(directory) if line["step"] <= step]
        with write_at_once(self.path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        with name_failures(self.path):
            self._file = self.path.open("ab", buffering=0)

    def write(self, values: dict[str, Any]) -> None:
        """Append one line. Raises WriteError: the disk is full, say."""
        with name_failures(self.path):
            self._file.write((json.dumps(values) + "\n").encode())

    def sync(self) -> None:
        """Wait until all lines are on the disk. Raises WriteError."""
        with name_failures(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Whatever was written is in the file already."""
        self._file.close()


class Speed:
    """Steps per second over the last steps."""

    def __init__(self, window: int = 20) -> None:
        self._times = deque([time.perf_counter()], maxlen=window + 1)

    def step(self) -> float:
        """Call it after each step."""
        self._times.append(time.perf_counter())
        return (len(self._times) - 1) / max(self._times[-1] - self._times[0], 1e-9)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that the device's allocator held, or of a process on the CPU the most that it had resident."""
    if device.type == "cpu":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kilobytes on Linux
    return int(torch.accelerator.max_memory_allocated(device))


class Records:
    """Log, trackers and bar of one run; only the first process has any of them.

    Args:
        accelerator: accelerate's, prepared for `trackers`. directory: of the run. step, steps: taken, and in all.
        every: steps between lines on stderr where that is no terminal, beside one a minute; 0: none.
    """

    def __init__(self, accelerator: Any, directory: Path, step: int, steps: int, every: int = 0) -> None:
        self.accelerator, self.main = accelerator, bool(accelerator.is_main_process)
        self.speed = Speed()
        if not self.main:
            return
        self.log = RunLog(directory, step)
        self.bar = ProgressBar("train", steps, done=step, every=every)
        self._validated = ""

    def step(self, values: dict[str, Any]) -> None:
        """After each step. values: of the log; `step` among them."""
        rate = self.speed.step()
        if not self.main:
            return
        values = values | {"steps_per_second": round(rate, 4), "peak_memory": peak_memory(self.accelerator.device)}
        self._log(values)
        loss = "not finite" if values["loss"] is None else f"{values['loss']:.4f}"
        memory = f"{values['peak_memory'] / 2**30:.1f} GiB"
        self.bar.advance(note=f"loss {loss}{self._validated}, {rate:.2f} steps/s, {memory}")

    def validation(self, step: int, loss: float) -> None:
        """After a validation."""
        if self.main:
            self._validated = f", validation {loss:.4f}"
            self._log({"step": step, "validation_loss": loss})

    def sync(self) -> None:
        """Before a checkpoint is written."""
        if self.main:
            self.log.sync()

    def _log(self, values: dict[str, Any]) -> None:
        self.log.write(values)
        numbers = {name: value for name, value in values.items() if isinstance(value, (int, float)) and name != "step"}
        self.accelerator.log(numbers, step=values["step"])

    def close(self) -> None:
        """End bar, log and trackers."""
        if self.main:
            self.bar.close()
            self.log.close()


def require_trackers(trackers: tuple[str, ...]) -> None:
    """Raises MissingPackageError for a tracker whose package is not installed."""
    import importlib.util

    for tracker in trackers:
        if importlib.util.find_spec(tracker) is None:
            raise MissingPackageError(
                f'the tracker {tracker!r} needs the package {tracker}: pip install "salad-compile[train]" {tracker}'
            )
