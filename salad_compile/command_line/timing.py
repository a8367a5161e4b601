"""Timing two calls in turns: the clocks, the spread, and the report of `salad-compile bench`."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from salad_compile.common.neighbours import caution
from salad_compile.common.reports import Report, Row, plural

Call = Callable[[], object]
MOST_FORWARDS = 16


@dataclass(frozen=True)
class Timings:
    """Milliseconds of one forward, one number for each round. first_ms: of the first call, which compiles.

    peak_bytes: the most memory that one forward took beyond what was allocated before; None if it is not counted.
    """

    name: str
    first_ms: float
    milliseconds: Sequence[float]
    peak_bytes: int | None

    @property
    def median(self) -> float:
        """The median of the rounds, in milliseconds."""
        return statistics.median(self.milliseconds)

    @property
    def spread(self) -> tuple[float, float]:
        """Bounds of the middle 80 % of the rounds."""
        ordered = sorted(self.milliseconds)
        return ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]


@dataclass(frozen=True, repr=False)
class BenchReport(Report):
    """Dense and SALAD beside each other."""

    dense: Timings
    salad: Timings
    facts: Mapping[str, Any]  # device, model and settings, of types that JSON can hold

    title = "one forward of the model, as in a denoising step"
    columns = ("attention", "median, ms", "middle 80 %, ms", "first call, s", "memory, GiB", "dense / this")

    def rows(self) -> list[Row]:
        return [self._row(timings) for timings in (self.dense, self.salad)]

    def _row(self, timings: Timings) -> Row:
        low, high = timings.spread
        return (
            timings.name,
            f"{timings.median:,.2f}",
            f"{low:,.2f} to {high:,.2f}",
            f"{timings.first_ms / 1e3:.1f}",
            "not counted" if timings.peak_bytes is None else f"{timings.peak_bytes / 2**30:.2f}",
            f"{self.dense.median / timings.median:.2f}x",
        )

    def notes(self) -> list[str]:
        facts = self.facts
        measured = "none" if facts["measured_sparsity"] is None else f"{facts['measured_sparsity']:.3f}"
        return [
            f"{facts['device']}, torch {facts['torch']}, {facts['dtype']}, {facts['compile']}; "
            f"{facts['rounds']} rounds of {facts['steps']} forwards each, dense and SALAD in turns",
            f"{facts['model']}: {plural(facts['sites'], 'site')}, up to {facts['tokens']:,} tokens, sparsity "
            f"{facts['sparsity']:.3f} ({measured} measured), LoRA {facts['lora']}",
            *filter(None, [caution(facts.get("other_cores", 0.0))]),
        ]

    def to_dict(self) -> dict[str, Any]:
        return {**self.facts, **{t.name: _as_json(t) for t in (self.dense, self.salad)}}


def _as_json(timings: Timings) -> dict[str, Any]:
    low, high = timings.spread
    return {
        "median_ms": timings.median,
        "p10_ms": low,
        "p90_ms": high,
        "first_call_ms": timings.first_ms,
        "peak_bytes": timings.peak_bytes,
        "timings_ms": list(timings.milliseconds),
    }


def time_in_turns(
    calls: Mapping[str, Call],
    first: Mapping[str, float],
    device: torch.device,
    *,
    steps: int,
    rounds: int,
    advance: Call,
) -> dict[str, Timings]:
    """Time all calls round after round, so that drift, heat and neighbours hit all of them alike.

    The order turns around with every round: whoever comes second finds other caches.

    Args:
        calls: name -> one forward. first: name -> result of :func:`first_call`.
        steps: forwards in one timing, of which the mean counts. rounds: timings of each.
        advance: called after each timing.
    """
    peaks = {name: _peak_bytes(call, device) for name, call in calls.items()}  # warms up, too
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        for name in list(calls)[:: -1 if number % 2 else 1]:
            times[name].append(_milliseconds(calls[name], device, steps))
            advance()
    return {name: Timings(name, first[name], times[name], peaks[name]) for name in calls}


def first_call(call: Call, device: torch.device) -> float:
    """Milliseconds of a call that compiles."""
    return _milliseconds(call, device, 1)


def forwards_of(calls: Iterable[Call], device: torch.device, steps: int, least_ms: float) -> int:
    """Forwards of one timing: so many that the fastest of the calls takes `least_ms`; at least `steps`."""
    if not least_ms:
        return steps
    fastest = min(_milliseconds(call, device, 1) for call in calls)
    return max(steps, min(MOST_FORWARDS, math.ceil(least_ms / max(fastest, 1e-3))))


def _milliseconds(call: Call, device: torch.device, steps: int) -> float:
    """Wall time of one call, the device's work included; the mean of `steps`."""
    _wait(device)
    start = time.perf_counter()
    for _ in range(steps):
        call()
    _wait(device)
    return (time.perf_counter() - start) * 1e3 / steps


def _peak_bytes(call: Call, device: torch.device) -> int | None:
    if device.type != "cuda":
        call()
        return None
    _wait(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    _wait(device)
    return torch.cuda.max_memory_allocated(device) - before


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with the threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} threads"


def _processor() -> str:
    import platform
    from pathlib import Path

    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
