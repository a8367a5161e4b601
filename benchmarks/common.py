"""Shared by the benchmarks: where a row was measured, timing in turns, statistics, and JSON that survives a kill.

A row is one timed call. All rows of a comparison are timed in turn, round after round, so that drift, heat and
neighbours hit all of them alike. A row that fails is kept, with its error.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from salad_compile.kernels import pool_blocks, select_blocks

BENCHMARKS = Path(__file__).resolve().parent
RESULTS = BENCHMARKS / "results"
FEWEST = 3  # timings of a row, however slow it is
LOAD, PRODUCTS = 4096, 10  # products of this size run ahead of a timing under load, at least as many
PRODUCT_MS = 0.2  # what one takes at most, on Hopper
HEAT_S = 2.0  # of products before the first timing under load
LOADED = "timed under load; burst_ after a rest"
BURSTS = 5  # rounds of timings after a rest
NOT_INSTALLED = "not installed"
LEFT_OUT = "left out"

Facts = dict[str, Any]
Run = Callable[[int], object]  # called with the number of the timing, so that it can choose among its inputs


# ---------------------------------------------------------------- where a row was measured


def commit() -> str:
    """The commit of these files, with a mark if the tree has changes; or `BENCHMARK_COMMIT`.

    The variable is for machines without the git history.
    """
    if given := os.environ.get("BENCHMARK_COMMIT"):
        return given
    git = ["git", "-C", str(BENCHMARKS)]
    try:
        found = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    if found.returncode:
        return ""
    return found.stdout.strip() + (" + changes" if changed.stdout.strip() else "")


def command() -> str:
    """The command line, to be typed again."""
    return " ".join(["python", *sys.argv])


def cpu_model() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    return names[0].split(":", 1)[1].strip() if names else platform.processor()


def device_kind(name: str) -> str:
    """A GPU's name as part of a file name: "NVIDIA H100 80GB HBM3" gives "h100"."""
    words = [word for word in re.split(r"[^A-Za-z0-9]+", name) if word and word != "NVIDIA"]
    return next((word for word in words if re.search(r"\d", word)), "-".join(words)).lower()


def default_output(script: str, device: torch.device) -> Path:
    """The file of a script's rows. A CPU run only checks that the script works, and is not kept."""
    if device.type == "cuda":
        return RESULTS / f"{script}_{device_kind(torch.cuda.get_device_name(device))}.json"
    return BENCHMARKS.parent / "out" / f"{script}.json"


def describe(device: torch.device) -> Facts:
    """Facts that every JSON row repeats, so that it can be read by itself."""
    cuda = device.type == "cuda"
    return {
        "command": command(),
        "commit": commit(),
        "device": torch.cuda.get_device_name(device) if cuda else cpu_model(),
        "device_memory_bytes": torch.cuda.get_device_properties(device).total_memory if cuda else None,
        "torch": torch.__version__,
        "triton": _triton_version(),
        "cuda": torch.version.cuda if cuda else None,
        "driver": _driver_version() if cuda else None,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _triton_version() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver_version() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.split("\n", 1)[0].strip() or None


# ---------------------------------------------------------------- statistics


def spread(times: Sequence[float]) -> Facts:
    """Median, and the bounds of the middle 80 %."""
    ordered = sorted(times)
    return {
        "median_ms": statistics.median(ordered),
        "p10_ms": ordered[len(ordered) // 10],
        "p90_ms": ordered[-1 - len(ordered) // 10],
    }


def select(query: Tensor, key: Tensor, query_block: int, key_block: int, permille: int) -> tuple[Tensor, Tensor]:
    """Routing: pool queries and keys, choose the key blocks."""
    pooled = pool_blocks(query, query_block), pool_blocks(key, key_block)
    lut, count = select_blocks(*pooled, query_block, key_block, permille)
    return lut, count


# ---------------------------------------------------------------- clocks


class CpuClock:
    """Wall time."""

    def synchronize(self) -> None:
        """Nothing is asynchronous on a CPU."""

    def milliseconds(self, run: Callable[[], object], ahead_ms: float = 0.0) -> float:
        """Time of one call."""
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3

    def under_load(self, run: Callable[[], object], ahead_ms: float = 0.0, calls: int = 0) -> float:
        """The same: a CPU has no load of ours."""
        return self.milliseconds(run)

    def heat(self, seconds: float) -> None:
        """Nothing, likewise."""

    def working_bytes(self, run: Callable[[], object]) -> tuple[object, int | None]:
        """The call's result; PyTorch does not count memory on a CPU."""
        return run(), None


class CudaClock:
    """Device time between two events, without the gaps that a slow launch from Python leaves.

    The device first spins for about as long as the host needs to queue the whole call. Without that, small kernels
    would be timed at the speed of the host; inside a model, the host is ahead of the device.
    """

    def __init__(self) -> None:
        self._square: Tensor | None = None
        # private (torch 2.11): spins on the device for a number of cycles
        self._spin: Any = torch.cuda._sleep
        cycles = 10_000_000
        torch.cuda.synchronize()
        self._spin(cycles)  # type: ignore[no-untyped-call]
        self._cycles_per_ms = cycles / self._between(lambda: self._spin(cycles))

    def synchronize(self) -> None:
        """Wait for the device."""
        torch.cuda.synchronize()

    def milliseconds(self, run: Callable[[], object], ahead_ms: float = 0.0) -> float:
        """Device time of one call, after the device span for `ahead_ms`."""
        torch.cuda.synchronize()
        if ahead_ms:
            self._spin(int(ahead_ms * self._cycles_per_ms))
        return self._between(run)

    def under_load(self, run: Callable[[], object], ahead_ms: float = 0.0, calls: int = 0) -> float:
        """Device time of one call in the middle of work: matrix products run ahead, for at least `ahead_ms`.

        Args:
            calls: so many calls that are not timed run before them, for the state in which a long run has the device.
        """
        torch.cuda.synchronize()
        for _ in range(calls):
            run()
        self._multiply(max(PRODUCTS, int(ahead_ms / PRODUCT_MS) + 1))
        return self._between(run)

    def heat(self, seconds: float) -> None:
        """Keep the device busy for so long."""
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            self._multiply(100)
            torch.cuda.synchronize()

    def _multiply(self, products: int) -> None:
        if self._square is None:
            self._square = torch.randn(LOAD, LOAD, device="cuda", dtype=torch.bfloat16)
        for _ in range(products):
            self._square @ self._square

    def working_bytes(self, run: Callable[[], object]) -> tuple[object, int | None]:
        """The call's result, and the most memory it took beyond what was allocated before, the result included."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        torch.cuda.synchronize()
        return result, torch.cuda.max_memory_allocated() - before

    @staticmethod
    def _between(run: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))


Clock = CpuClock | CudaClock


def clock_for(device: torch.device) -> Clock:
    """The clock of a device."""
    return CudaClock() if device.type == "cuda" else CpuClock()


# ---------------------------------------------------------------- budget and rows


class Budget:
    """Seconds after which a run starts no new rows."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self._start = time.perf_counter()

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start

    def spent(self) -> bool:
        """Whether no new row may start."""
        return self.seconds is not None and self.elapsed() > self.seconds

    def excuse(self) -> str:
        """The error of a row that was not started."""
        return f"{LEFT_OUT}: the budget of {self.seconds:.0f} s was spent"


@dataclass
class Row:
    """One timed call.

    Attributes:
        facts: fields of the JSON row beside the timings: at least "row", "case", "kind" and "pass".
        prepare: builds the call; may allocate and compile, may add facts, may raise.
    """

    facts: Facts
    prepare: Callable[[Facts], Run]
    run: Run | None = None
    error: str | None = None
    estimate_ms: float = 0.0
    host_ms: float = 0.0
    milliseconds: list[float] = field(default_factory=list)
    sustained: list[float] = field(default_factory=list)

    def fail(self, error: BaseException | str) -> None:
        """Keep the error, and release what the row holds."""
        text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        self.error, self.run = text[:600], None

    def release(self) -> None:
        """Release inputs and graphs; the timings stay."""
        self.run = None
        self.prepare = _released

    def to_json(self) -> Facts:
        """The row, without comparisons with other rows.

        Timings under load, if there are any, and then those after a rest with "burst_" before their names.
        """
        main = self.sustained or self.milliseconds
        timed = {**(spread(main) if main else {}), "timings_ms": [round(ms, 5) for ms in main]}
        if self.sustained and self.milliseconds:
            burst = {**spread(self.milliseconds), "timings_ms": [round(ms, 5) for ms in self.milliseconds]}
            timed |= {f"burst_{name}": value for name, value in burst.items()}
        return {**self.facts, **timed, "error": self.error}


def _released(_: Facts) -> Run:
    raise RuntimeError("this row was released")


def warm_up(row: Row, clock: Clock, budget: Budget) -> None:
    """Prepare a row, run it, check its result, and record its memory and approximate duration."""
    if budget.spent():
        row.fail(budget.excuse())
        return
    try:
        run = row.prepare(row.facts)
        if "first_call_s" not in row.facts:
            run(0)
        clock.synchronize()
        start = time.perf_counter()
        result, row.facts["working_bytes"] = clock.working_bytes(lambda: run(1))
        row.estimate_ms = (time.perf_counter() - start) * 1e3
        _check_finite(result)
        del result
        if row.estimate_ms < 1000:
            row.estimate_ms, row.host_ms = _estimate(run, clock)
        row.run = run
    except Exception as error:  # a row that fails is a result, and must not stop the others
        row.fail(error)
        free_memory()


def _estimate(run: Run, clock: Clock) -> tuple[float, float]:
    """Milliseconds of one call, and how many of them the host takes until the call is queued."""
    queued: list[float] = []

    def call() -> None:
        start = time.perf_counter()
        run(2)
        queued.append((time.perf_counter() - start) * 1e3)

    return clock.milliseconds(call), queued[0]


def _check_finite(result: object) -> None:
    tensors = [result] if isinstance(result, Tensor) else list(result) if isinstance(result, tuple | list) else []
    for tensor in tensors:
        if isinstance(tensor, Tensor) and not bool(torch.isfinite(tensor).all()):
            raise ArithmeticError("the result is not finite")


def free_memory() -> None:
    """Give cached memory back, after a row that ran out of it or between comparisons."""
    gc.collect()
    if torch.cuda.is_available():
        try:
            torch.cuda.empty_cache()
        except RuntimeError as error:  # after an illegal access every call fails; the rows say so one by one
            print(f"  memory could not be freed: {error}", flush=True)


def take_turns(
    rows: Sequence[Row],
    clock: Clock,
    rounds: int,
    row_seconds: float,
    after_round: Callable[[], None] = lambda: None,
    *,
    sustained: bool = False,
    rest_s: float = 0.0,
) -> None:
    """Time all prepared rows in turn.

    Args:
        rounds: how often the fast rows are timed.
        row_seconds: a slow row is timed in as many rounds, evenly spread, as fit into this, at least in `FEWEST`.
        after_round: called after every round, to keep what was measured so far.
        sustained: time under load, with a call before it where that is not too long.
        rest_s: seconds that the device rests before every timing; not with `sustained`.
    """
    for number in range(rounds):
        for row in rows:
            if row.run is None or not _due(row, number, rounds, row_seconds):
                continue
            run, index = row.run, number
            try:
                # at most 50 ms: for a call that takes longer to queue the gaps do not matter
                ahead = min(1.5 * row.host_ms + 0.1, 50.0) if row.estimate_ms < 100 else 0.0
                if sustained:
                    calls = int(100 <= row.estimate_ms < 1000)
                    row.sustained.append(clock.under_load(lambda: run(index), ahead, calls))  # noqa: B023
                else:
                    time.sleep(rest_s)
                    row.milliseconds.append(clock.milliseconds(lambda: run(index), ahead))  # noqa: B023
            except Exception as error:
                row.fail(error)
        after_round()


def take_both_turns(
    rows: Sequence[Row],
    clock: Clock,
    rounds: int,
    row_seconds: float,
    after_round: Callable[[], None],
    *,
    rest_s: float,
) -> None:
    """Time all prepared rows under load, and then after rests: a power-capped GPU is faster for a moment.

    See `take_turns`. On a CPU, where there is no such difference, once.
    """
    clock.heat(HEAT_S)
    take_turns(rows, clock, rounds, row_seconds, after_round, sustained=True)
    if isinstance(clock, CudaClock):
        take_turns(rows, clock, min(rounds, BURSTS), row_seconds, after_round, rest_s=rest_s)


def compare_bursts(rows: Sequence[Facts]) -> None:
    """Add "burst_speedup": the fastest dense row of the same pass after a rest, over the row after a rest."""
    timed = [row for row in rows if "burst_median_ms" in row and not row["error"] and row["kind"] != "ceiling"]
    for row in timed:
        dense = [r["burst_median_ms"] for r in timed if r["kind"] == "dense" and r["pass"] == row["pass"]]
        if dense:
            row["burst_speedup"] = min(dense) / row["burst_median_ms"]


def _due(row: Row, number: int, rounds: int, row_seconds: float) -> bool:
    affordable = int(row_seconds * 1e3 / max(row.estimate_ms, 1e-6))
    times = min(rounds, max(FEWEST, affordable))
    return (number + 1) * times // rounds > number * times // rounds


# ---------------------------------------------------------------- JSON


class Results:
    """The rows of one run in one file, rewritten after every change, so that a kill loses nothing."""

    def __init__(self, path: Path, common: Facts) -> None:
        self.path, self.common = path, common
        self._done: list[Facts] = []
        self._written = 0.0
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, rows: Iterable[Facts]) -> None:
        """Rows that are finished."""
        self._done.extend(rows)
        self.write()

    def write(self, unfinished: Iterable[Facts] = ()) -> None:
        """Write a temporary file and rename it."""
        rows = [self.common | row for row in (*self._done, *unfinished)]
        temporary = self.path.with_suffix(".writing")
        temporary.write_text(json.dumps(rows, indent=1) + "\n")
        temporary.replace(self.path)
        self._written = time.perf_counter()

    def write_sometimes(self, unfinished: Callable[[], Iterable[Facts]], seconds: float = 5.0) -> None:
        """The same, unless it was written a short time ago."""
        if time.perf_counter() - self._written > seconds:
            self.write(unfinished())

    def rows(self) -> list[Facts]:
        """All finished rows, as they are in the file."""
        return [self.common | row for row in self._done]
