"""How much of the processor other processes take while this one times something on it.

A busy neighbour slows block-sparse attention more than dense attention: each of its many short parallel regions waits
for the slowest thread. A ratio of seconds that was measured beside one says little, so whoever prints it says so.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

TOLERABLE = 0.1  # cores; what a desktop does by itself


class Neighbours:
    """Counts from where it is made: `Neighbours().cores` is asked for when the timing is done."""

    def __init__(self) -> None:
        self._start, self._before = time.perf_counter(), busy_seconds()

    @property
    def cores(self) -> float:
        """Cores that other processes kept busy on average; 0.0 where the system does not tell (no /proc/stat)."""
        (everybody, own), (everybody_before, own_before) = busy_seconds(), self._before
        taken = (everybody - everybody_before) - (own - own_before)
        return max(0.0, taken / (time.perf_counter() - self._start))


def busy_seconds() -> tuple[float, float]:
    """CPU seconds used so far by all processes, and by this one; zeros if /proc/stat does not exist."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0, 0.0
    user, nice, system, _, _, irq, softirq, steal = map(int, stat.read_text().split("\n", 1)[0].split()[1:9])
    own = os.times()
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK"), own.user + own.system


def caution(cores: float) -> str | None:
    """What to print beside timings of a CPU, or None if it was quiet."""
    if cores <= TOLERABLE:
        return None
    return (
        f"Other processes kept {cores:.1f} of {os.cpu_count()} cores busy meanwhile, which slows SALAD more than dense "
        "attention: time it on a quiet machine."
    )
