"""Records of a run: the log that is always written, accelerate's trackers, progress on stderr."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from salad_compile.common.checks import is_int
from salad_compile.common.files import name_failures, write_at_once
from salad_compile.common.logs import logger
from salad_compile.common.paths import as_path
from salad_compile.common.progress import ProgressBar, Tell
from salad_compile.errors import CheckpointError, MissingPackageError
from salad_compile.salad_files.location import FILE_NAME
from salad_compile.salad_files.runs import SUMMARY_FILE, checkpoint_name, finished_steps
from salad_compile.training.outcome import Outcome, outcome_of
from salad_compile.training.settings import TrainSettings

LOG_FILE = "log.jsonl"
EMA_FILE_NAME = "salad_ema.safetensors"
RESULT = "result"  # of a finished run, in the last line of its log
_LARGEST = 1e300
_TEXTS = ("stage", "validation_data", RESULT)


def read_log(directory: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a run's log, in order.

    What is no line of a log is left out: a last one that a killed run left unfinished, and what a loss of power left of
    lines after the last checkpoint.
    """
    path = as_path(directory) / LOG_FILE
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
    whole = isinstance(values, dict) and is_int(values.get("step"))
    return values if whole and all(_fits(name, value) for name, value in values.items()) else None


def _fits(name: str, value: object) -> bool:
    """Whether a line may say this: text, or a finite number where it has one."""
    if name in _TEXTS:
        return isinstance(value, str)
    return value is None or (isinstance(value, (int, float)) and -_LARGEST < value < _LARGEST)


class RunLog:
    """`log.jsonl`: one JSON object a line, appended with one write each. A killed run can leave half of its last one.

    A resumed run drops what was logged after its checkpoint, and the result of an earlier end, so that the curve is
    that of an uninterrupted run. Lines are on the disk before the next checkpoint is: a loss of power costs those after
    the last one.

    Args:
        directory: of the run. step: of the checkpoint from which it resumes; 0: from the beginning.

    Attributes:
        seconds: that the steps took which are in the log already.
    """

    def __init__(self, directory: Path, step: int) -> None:
        self.path = directory / LOG_FILE
        kept = [line for line in read_log(directory) if line["step"] <= step and RESULT not in line]
        self.seconds = max((line.get("seconds", 0.0) for line in kept), default=0.0)
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
        accelerator: accelerate's, prepared for `trackers`. directory: of the run. step: taken so far.
    """

    def __init__(self, accelerator: Any, directory: Path, step: int, settings: TrainSettings) -> None:
        self.accelerator, self.main = accelerator, bool(accelerator.is_main_process)
        self.speed, self.settings = Speed(), settings
        self._began = time.perf_counter()
        self._first: dict[str, Any] = {}
        self._validated = ""
        if self.main:
            self.log = RunLog(directory, step)
            self.bar = ProgressBar("train", settings.steps, done=step, every=settings.log_every)

    def step(self, values: dict[str, Any]) -> None:
        """After each step. values: of the log; `step` among them."""
        rate = self.speed.step()
        if not self.main:
            return
        values = values | {"steps_per_second": round(rate, 4), "peak_memory": peak_memory(self.accelerator.device)}
        self._log(values | {"seconds": round(self._seconds(), 3)})
        loss = "not finite" if values["loss"] is None else f"{values['loss']:.4f}"
        memory = f"{values['peak_memory'] / 2**30:.1f} GiB"
        self.bar.advance(note=f"loss {loss}{self._validated}, {rate:.2f} steps/s, {memory}")

    def first(self, step: int, losses: dict[str, Any]) -> None:
        """What later losses are compared with, when it has been measured."""
        self.compare(losses)
        if self.main:
            self._log({"step": step, **losses})
            self.bar.say(f"step {step}: {self._outcome(losses.get('validation_loss')).verdict()}")

    def compare(self, losses: dict[str, Any]) -> None:
        """Later losses are compared with these, of :func:`salad_compile.training.validation.first_losses`."""
        self._first = losses

    def validation(self, step: int, loss: float) -> None:
        """After a validation. While the sparsity still grows its loss is not comparable with those of the start."""
        if not self.main:
            return
        self._validated = f", validation {loss:.4f}"
        outcome = self._outcome(loss)
        if 0 < step <= self.settings.sparsity_warmup:  # step n has taken the n-th sparsity, counted from 0
            outcome = Outcome(None, loss, None, outcome.seconds)
        seconds = round(outcome.seconds, 3)
        self._log({"step": step, "validation_loss": loss, "gap_closed": outcome.gap_closed, "seconds": seconds})
        self.bar.say(f"step {step}: {outcome.verdict()}")

    def telling(self, what: str) -> Tell:
        """For what takes long between two steps: how far it is stands behind the bar."""

        def tell(done: int, total: int) -> None:
            if self.main:
                self.bar.advance(0, note=f"{what} {done} of {total}")

        return tell

    def samples(self, step: int, files: list[Path]) -> None:
        """After clips were sampled, in the process that wrote them."""
        for file in files:
            self.bar.say(f"step {step}: dense beside SALAD in {file}")

    def result(self, step: int) -> None:
        """At the end of a run, once: the last line of the log, and the time of all of it."""
        if self.main:
            outcome = replace(outcome_of(read_log(self.log.path.parent)), seconds=round(self._seconds(), 3))
            line = {"step": step, "gap_closed": outcome.gap_closed, "seconds": outcome.seconds}
            self.log.write({**line, RESULT: outcome.sentence()})

    def _seconds(self) -> float:
        return self.log.seconds + time.perf_counter() - self._began

    def _outcome(self, now: float | None) -> Outcome:
        untrained, dense = (self._first.get(f"{name}_validation_loss") for name in ("untrained", "dense"))
        return Outcome(untrained, now, dense, self._seconds())

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


def set_aside(directory: Path, step: int) -> None:
    """The results of a run that goes on are no longer those of its newest state: they get their step's name.

    Args:
        step: of the checkpoint it goes on from, for a summary that does not say of which step it is.
    """
    if not (directory / SUMMARY_FILE).exists():
        return
    with contextlib.suppress(CheckpointError, OSError):
        step = finished_steps(directory) or step
    for name in (FILE_NAME, EMA_FILE_NAME, SUMMARY_FILE):  # after a kill in between the next start does the rest
        file = directory / name
        if file.exists():
            aside = file.with_stem(f"{file.stem}-{checkpoint_name(step)}")
            with name_failures(aside):
                file.replace(aside)
            logger.warning("%s is of step %d, and the run goes on: it is called %s now", file, step, aside.name)


def flat(settings: TrainSettings) -> dict[str, Any]:
    """For trackers, which take numbers and strings."""
    return {
        name: value if isinstance(value, (int, float, str)) else json.dumps(value)
        for name, value in settings.to_dict().items()
    }
