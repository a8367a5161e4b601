"""Records of a run: the log that is always written, accelerate's trackers, a progress bar on a terminal."""

from __future__ import annotations

import json
import os
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch

from salad_compile.common.files import write_at_once
from salad_compile.common.progress import ProgressBar
from salad_compile.errors import MissingPackageError

LOG_FILE = "log.jsonl"


def read_log(directory: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a run's log, in order; a last line that a killed run left unfinished is left out."""
    path = Path(directory) / LOG_FILE
    if not path.exists():
        return []
    whole = path.read_text().rpartition("\n")[0]
    return [json.loads(line) for line in whole.splitlines()]


class RunLog:
    """`log.jsonl`: one JSON object a line, appended with one write each. A killed run can leave half of its last one.

    A resumed run drops what was logged after its checkpoint, so that the curve is that of an uninterrupted run.

    Args:
        directory: of the run. step: of the checkpoint from which it resumes; 0: from the beginning.
    """

    def __init__(self, directory: Path, step: int) -> None:
        self.path = directory / LOG_FILE
        kept = [line for line in read_log(directory) if line["step"] <= step]
        if self.path.exists():
            with write_at_once(self.path) as temporary:
                temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._file = self.path.open("ab", buffering=0)

    def write(self, values: dict[str, Any]) -> None:
        """Append one line."""
        self._file.write((json.dumps(values) + "\n").encode())

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
    """

    def __init__(self, accelerator: Any, directory: Path, step: int, steps: int) -> None:
        self.accelerator, self.main = accelerator, bool(accelerator.is_main_process)
        self.speed = Speed()
        if not self.main:
            return
        self.log = RunLog(directory, step)
        self.bar = ProgressBar("train", steps, done=step)

    def step(self, values: dict[str, Any]) -> None:
        """After each step. values: of the log; `step` among them."""
        rate = self.speed.step()
        if not self.main:
            return
        values = values | {"steps_per_second": round(rate, 4), "peak_memory": peak_memory(self.accelerator.device)}
        self._log(values)
        skipped = values["loss"] is None
        self.bar.advance(note=None if skipped else f"{rate:.2f} steps/s, loss {values['loss']:.4f}")

    def validation(self, step: int, loss: float) -> None:
        """After a validation."""
        if self.main:
            self._log({"step": step, "validation_loss": loss})

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
