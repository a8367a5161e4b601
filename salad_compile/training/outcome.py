"""What a run of training came to: how much of the loss that sparsity costs was won back, in how much time."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SMALLEST_GAP = 1e-3  # of the dense loss: less than this is rounding in bf16, and a share of it says nothing


@dataclass(frozen=True)
class Outcome:
    """Validation losses on the same items, noises and noise levels; each None if it was not measured.

    Attributes:
        untrained: of the conversion before any training: sparse attention and compensation, at the
            sparsity of the conversion.
        now: of the branches as they are. dense: of the base model.
        seconds: spent training, all parts of a continued run together.
    """

    untrained: float | None
    now: float | None
    dense: float | None
    seconds: float

    @property
    def gap_closed(self) -> float | None:
        """0 at the untrained conversion's loss, 1 at the base model's; None where sparsity costs nothing to win back"""
        if self.untrained is None or self.dense is None or self.now is None:
            return None
        if self.untrained - self.dense <= SMALLEST_GAP * abs(self.dense):
            return None
        return (self.untrained - self.now) / (self.untrained - self.dense)

    def sentence(self) -> str:
        """As in "validation 0.139 untrained, 0.098 now, dense 0.079: 68 % of the gap closed; 3 h 12 min"."""
        return f"{self.verdict()}; {duration(self.seconds)}"

    def verdict(self) -> str:
        """The sentence without the time."""
        if self.untrained is None or self.dense is None:
            known = "no validation data, so nothing says whether it worked"
            return known if self.now is None else f"validation {self.now:.4g}"
        if self.now is None:
            return f"validation {self.untrained:.4g} untrained, dense {self.dense:.4g}"
        losses = f"validation {self.untrained:.4g} untrained, {self.now:.4g} now, dense {self.dense:.4g}"
        closed = self.gap_closed
        if closed is None:
            little = f"sparsity costs less than {100 * SMALLEST_GAP:g} % of the loss here"
            return f"{losses}: {little}, so there is no gap to close"
        if closed < 0:
            return f"{losses}: worse than before training"
        if closed > 1:
            return f"{losses}: all of the gap closed, and lower than dense attention"
        return f"{losses}: {100 * closed:.0f} % of the gap closed"

    def to_dict(self) -> dict[str, Any]:
        """For `training.json`: numbers, and the sentence."""
        return {**dataclasses.asdict(self), "gap_closed": self.gap_closed, "sentence": self.sentence()}


def outcome_of(log: list[dict[str, Any]]) -> Outcome:
    """Of the lines of a run's log."""

    def last(name: str) -> Any:
        return next((line[name] for line in reversed(log) if name in line), None)

    untrained, dense = last("untrained_validation_loss"), last("dense_validation_loss")
    found = Outcome(untrained, last("validation_loss"), dense, last("seconds") or 0.0)
    validations = [line for line in log if "validation_loss" in line]
    if validations and validations[-1].get("gap_closed", 0.0) is None and found.gap_closed is not None:
        return dataclasses.replace(found, untrained=None)  # the sparsity still grew: that loss is of another one
    return found


def duration(seconds: float) -> str:
    """`3 h 12 min`, `12 min`, `41 s`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        finished: False after SIGTERM, SIGINT or SIGHUP; the same call resumes.
        step: optimizer steps taken. loss: of the last one, None if it was left out.
        validation_loss: of the last validation, or None.
        file: the SALAD file of the trained branches; None unless finished.
        outcome: what the training gained.
        checkpoint: the directory of the newest checkpoint. signal: the number of the signal that ended the run, or 0.
    """

    finished: bool
    step: int
    loss: float | None
    validation_loss: float | None
    file: Path | None
    outcome: Outcome
    checkpoint: Path | None = None
    signal: int = 0
