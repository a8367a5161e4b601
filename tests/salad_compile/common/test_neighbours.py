"""What other processes take of the processor, and what is said about it."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from salad_compile.common import neighbours
from salad_compile.common.neighbours import TOLERABLE, Neighbours, caution


@pytest.mark.skipif(not neighbours.Path("/proc/stat").exists(), reason="the system does not tell")
def test_another_process_counts_and_this_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    spin = "import time\nend = time.process_time() + 0.6\nwhile time.process_time() < end: pass"
    everybody, own = neighbours.busy_seconds()
    subprocess.run([sys.executable, "-c", spin], check=True)
    everybody_after, own_after = neighbours.busy_seconds()
    assert everybody_after - everybody >= 0.5
    assert own_after - own < 0.5
    start = time.process_time()
    while time.process_time() < start + 0.3:
        pass
    assert neighbours.busy_seconds()[1] - own_after >= 0.25


@pytest.mark.parametrize(
    ("everybody", "own", "cores"), [(8.0, 8.0, 0.0), (8.0, 2.0, 1.5), (0.0, 1.0, 0.0)], ids=["alone", "beside", "odd"]
)
def test_cores_of_the_others(everybody: float, own: float, cores: float, monkeypatch: pytest.MonkeyPatch) -> None:
    counters = iter([(100.0, 50.0), (100.0 + everybody, 50.0 + own)])
    clock = iter([10.0, 14.0])
    monkeypatch.setattr(neighbours, "busy_seconds", lambda: next(counters))
    monkeypatch.setattr(neighbours.time, "perf_counter", lambda: next(clock))
    assert Neighbours().cores == cores


def test_what_is_said() -> None:
    assert caution(0.0) is None
    assert caution(TOLERABLE) is None
    said = caution(1.26)
    assert said is not None
    assert said.startswith(f"Other processes kept 1.3 of {os.cpu_count()} cores busy")
