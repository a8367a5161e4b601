"""Timing in turns, failures that stay rows, and files that survive a kill."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch


class FakeClock:
    """Every call takes what the row says; the order of the calls is kept."""

    def __init__(self) -> None:
        self.ahead: list[float] = []
        self.loaded: list[Any] = []

    def synchronize(self) -> None:
        pass

    def milliseconds(self, run: Any, ahead_ms: float = 0.0) -> float:
        self.ahead.append(ahead_ms)
        return float(run() or 0)

    def under_load(self, run: Any, ahead_ms: float = 0.0, calls: int = 0) -> float:
        self.loaded.append((ahead_ms, calls))
        return 2 * float(run() or 0)

    def heat(self, seconds: float) -> None:
        self.loaded.append(("heat", seconds))

    def working_bytes(self, run: Any) -> tuple[object, int]:
        return run(), 5


def row_of(common: ModuleType, name: str, run: Any) -> Any:
    return common.Row({"row": name}, lambda facts: run)


def test_slow_rows_are_timed_less_often_and_evenly(common: ModuleType) -> None:
    calls: list[str] = []

    def taking(name: str, ms: float) -> Any:
        row = row_of(common, name, None)
        row.run = lambda number: calls.append(name) or ms
        row.estimate_ms = ms
        return row

    fast, slow, slowest = taking("fast", 1.0), taking("slow", 200.0), taking("slowest", 10_000.0)
    common.take_turns([fast, slow, slowest], FakeClock(), 12, 1.2)
    assert [len(row.milliseconds) for row in (fast, slow, slowest)] == [12, 6, 3]
    assert calls[:4] == ["fast", "fast", "slow", "fast"], "in turn, the slow ones spread over the rounds"
    assert calls[-3:] == ["fast", "slow", "slowest"]


def test_a_failure_stays_a_row_and_harms_no_other(common: ModuleType) -> None:
    def broken(number: int) -> float:
        if number == 1:
            raise ValueError("no kernel")
        return 2.0

    def late(number: int) -> float:
        if number == 4:
            raise RuntimeError("out of memory")
        return 3.0

    rows = [row_of(common, "broken", broken), row_of(common, "late", late), row_of(common, "good", lambda _: 4.0)]
    clock, budget = FakeClock(), common.Budget(None)
    for row in rows:
        common.warm_up(row, clock, budget)
    common.take_turns(rows, clock, 6, 10)
    found = [row.to_json() for row in rows]
    assert found[0]["error"] == "ValueError: no kernel"
    assert found[0]["timings_ms"] == []
    assert found[1]["error"] == "RuntimeError: out of memory"
    assert found[1]["timings_ms"] == [3.0] * 4
    assert found[2]["error"] is None
    assert found[2]["timings_ms"] == [4.0] * 6
    assert found[2]["working_bytes"] == 5


def test_results_that_are_not_finite_are_a_failure(common: ModuleType) -> None:
    row = row_of(common, "nan", lambda number: (torch.zeros(2), torch.tensor([1.0, math.nan])))
    common.warm_up(row, common.CpuClock(), common.Budget(None))
    assert row.error == "ArithmeticError: the result is not finite"


def test_a_spent_budget_starts_no_row(common: ModuleType) -> None:
    def never(facts: dict[str, Any]) -> Any:
        raise AssertionError("prepared")

    row = common.Row({"row": "late"}, never)
    common.warm_up(row, common.CpuClock(), common.Budget(-1.0))
    assert row.error.startswith("left out: the budget of")


def test_the_host_is_let_ahead_of_fast_rows_only(common: ModuleType) -> None:
    fast, slow = (row_of(common, name, None) for name in ("fast", "slow"))
    fast.run = slow.run = lambda number: 1.0
    fast.estimate_ms, fast.host_ms, slow.estimate_ms, slow.host_ms = 1.0, 2.0, 500.0, 2.0
    clock = FakeClock()
    common.take_turns([fast, slow], clock, 1, 10)
    assert clock.ahead == [pytest.approx(3.1), 0.0]


def test_rows_are_timed_under_load_and_after_rests(common: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    fast, slow = (row_of(common, name, None) for name in ("fast", "slow"))
    fast.run, slow.run = (lambda number: 1.0), (lambda number: 200.0)
    fast.estimate_ms, fast.host_ms, slow.estimate_ms = 1.0, 2.0, 200.0
    rested: list[float] = []
    monkeypatch.setattr(common.time, "sleep", rested.append)
    monkeypatch.setattr(common, "CudaClock", FakeClock)
    clock = FakeClock()
    common.take_both_turns([fast, slow], clock, 8, 100.0, lambda: None, rest_s=0.5)
    assert clock.loaded[0] == ("heat", 2.0)
    assert clock.loaded[1:3] == [(pytest.approx(3.1), 0), (0.0, 1)], "a call ahead where that is not too long"
    assert rested == [0.5] * 10, "five rounds of two rows"
    about = fast.to_json()
    assert (about["median_ms"], about["burst_median_ms"]) == (2.0, 1.0)
    assert (len(about["timings_ms"]), len(about["burst_timings_ms"])) == (8, 5)
    facts = [{"kind": kind, "pass": "forward", **row.to_json()} for kind, row in (("dense", slow), ("salad", fast))]
    common.compare_bursts(facts)
    assert [row["burst_speedup"] for row in facts] == [1.0, 200.0]


def test_a_cpu_has_no_bursts(common: ModuleType) -> None:
    row = row_of(common, "row", None)
    row.run, row.estimate_ms = (lambda number: None), 1.0
    common.take_both_turns([row], common.CpuClock(), 4, 10.0, lambda: None, rest_s=9.0)
    about = row.to_json()
    assert len(about["timings_ms"]) == 4
    assert "burst_median_ms" not in about


def test_rows_are_in_the_file_after_every_change(common: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.json"
    results = common.Results(path, {"device": "x"})
    results.write([{"row": "unfinished"}])
    assert json.loads(path.read_text()) == [{"device": "x", "row": "unfinished"}]
    results.add([{"row": "a"}])
    results.add([{"row": "b"}])
    assert json.loads(path.read_text()) == [{"device": "x", "row": "a"}, {"device": "x", "row": "b"}]
    assert list(path.parent.iterdir()) == [path], "no temporary file is left"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("Imaginary Device", "imaginary-device"),
    ],
)
def test_device_kind(common: ModuleType, name: str, kind: str) -> None:
    assert common.device_kind(name) == kind


def test_a_cpu_run_is_not_kept_among_the_results(common: ModuleType) -> None:
    assert common.default_output("attention", torch.device("cpu")).parent.name == "out"


def test_the_cuda_clock_spins_before_it_starts(common: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[Any] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            happened.append("record")

        def synchronize(self) -> None:
            happened.append("wait")

        def elapsed_time(self, other: Event) -> float:
            return 5.0

    fake = SimpleNamespace(
        Event=Event,
        _sleep=lambda cycles: happened.append(cycles),
        synchronize=lambda: None,
        reset_peak_memory_stats=lambda: None,
        memory_allocated=lambda: 10,
        max_memory_allocated=lambda: 17,
    )
    monkeypatch.setattr(common.torch, "cuda", fake)
    clock = common.CudaClock()
    happened.clear()
    assert clock.milliseconds(lambda: happened.append("run"), 2.0) == 5.0
    assert happened == [4_000_000, "record", "run", "record", "wait"]  # 10 million cycles took 5 ms
    assert clock.working_bytes(lambda: "result") == ("result", 7)
    happened.clear()

    class Square:
        def __matmul__(self, other: object) -> None:
            happened.append("product")

    monkeypatch.setattr(common.torch, "randn", lambda *size, device, dtype: Square())
    assert clock.under_load(lambda: happened.append("run"), 2.5, 1) == 5.0
    assert happened == ["run", *["product"] * 13, "record", "run", "record", "wait"]
    happened.clear()
    clock.under_load(lambda: happened.append("run"))
    assert happened.count("product") == 10
