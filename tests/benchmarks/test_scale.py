"""The benchmark of several processes: rows of two processes over gloo, and what ends a case that goes wrong."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.benchmarks.conftest import BENCHMARKS
from tests.end_to_end.scripts import run_script
from tests.trainers.processes import in_two_processes


@pytest.fixture
def scale(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    yield importlib.import_module("scale")
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHMARKS)):
            del sys.modules[name]


OPTIONS = argparse.Namespace(
    device="cpu", compiler="eager", sparsity=0.5, rounds=2, row_seconds=1.0, case_seconds=60.0, verbose=False
)


def time_a_step(rank: int, folder: Path) -> None:
    sys.path.insert(0, str(BENCHMARKS))
    worker = importlib.import_module("scale_worker")
    worker.Worker(json.loads((folder / "plan.json").read_text())).run()


def plan_of(scale: ModuleType, folder: Path, kinds: tuple[str, ...]) -> tuple[Any, dict[str, Any]]:
    model = replace(scale.tiny(scale.models()["1.3B-480p"]), layers=1)
    case = scale.Case(model, "denoising step", 2, kinds)
    plan = {"model": vars(model), "kinds": kinds, "step": case.step, "folder": str(folder), "seconds": 60}
    return case, plan | {
        name: getattr(OPTIONS, name) for name in ("device", "compiler", "sparsity", "rounds", "row_seconds")
    }


def test_two_processes_write_complete_rows(tmp_path: Path, scale: ModuleType) -> None:
    case, plan = plan_of(scale, tmp_path, ("salad", "dense", "salad-in-turn"))
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    (tmp_path / "outputs").mkdir()
    in_two_processes(time_a_step, tmp_path, backend=None)
    salad, dense, in_turn = rows = scale.read_rows(case, OPTIONS, tmp_path, "")
    scale.compare(rows)
    for row in rows:
        assert row["error"] is None
        assert len(row["timings_ms"]) == 2
        assert (row["degree"], row["tokens"], row["heads"], row["layers"]) == (2, 256, 4, 1)
        assert row["parameter_bytes"] > 0
        assert 0 < row["exchange_ms"] <= row["exchange_waiting_ms"]
    assert 0 < salad["measured_sparsity"] < 0.6
    assert salad["speedup"] == dense["median_ms"] / salad["median_ms"]
    assert salad["exchanges"]["gloo:all_to_all"] == 4  # query, key, value; output
    assert dense["ulysses_degree"] == 2
    assert in_turn["exchanges"] == salad["exchanges"]


def test_efficiency_is_of_one_gpu(scale: ModuleType) -> None:
    rows = [
        {"case": "a", "pass": step, "kind": kind, "degree": degree, "median_ms": ms, "error": None}
        for step, kind, degree, ms in [
            ("denoising step", "salad", 1, 100.0),
            ("denoising step", "salad", 4, 50.0),
            ("training step", "ddp", 1, 100.0),
            ("training step", "ddp", 4, 125.0),
        ]
    ]
    scale.compare(rows)
    assert [row["efficiency"] for row in rows] == [1.0, 0.5, 1.0, 0.8]


def start(code: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-S", "-c", code], start_new_session=True)


def test_a_process_that_fails_or_hangs_ends_its_case(
    tmp_path: Path, scale: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scale, "GRACE_S", 0.2)
    waits = "import time; time.sleep(600)"
    begun = time.perf_counter()
    for codes, seconds, expected in [
        (["raise SystemExit(3)", waits], 500, "process 0 ended with 3"),
        ([waits, waits], 1, "the time limit of 1 s was reached"),
        (["", ""], 500, ""),
    ]:
        processes = [start(code) for code in codes]
        try:
            assert scale.wait(processes, seconds, lambda: None) == expected
        finally:
            scale.stop(processes)
        assert all(process.returncode is not None for process in processes)
    assert time.perf_counter() - begun < 300
    # and its rows say so, with what a process said last
    case, _ = plan_of(scale, tmp_path, ("salad", "dense"))
    (tmp_path / "rows.json").write_text(json.dumps({"salad": {"timings_ms": [1.0], "median_ms": 1.0}}))
    (tmp_path / "said-0").write_text("waits")
    (tmp_path / "said-1").write_text("Traceback\nRuntimeError: no memory")
    salad, dense = scale.read_rows(case, OPTIONS, tmp_path, "process 1 ended with 1")
    assert salad["error"] is None
    assert dense["error"] == "process 1 ended with 1: RuntimeError: no memory"


@pytest.mark.all_cases
def test_the_script_runs(tmp_path: Path) -> None:
    output = tmp_path / "rows.json"
    options = ["--tiny", "--device", "cpu", "--compiler", "eager", "--models", "1.3B-480p"]
    options += ["--degrees", "1", "2", "--output", str(output)]
    run_script(BENCHMARKS / "scale.py", *options, said=tmp_path / "said")
    rows = json.loads(output.read_text())
    assert [(row["kind"], row["degree"]) for row in rows] == [
        *(("salad", 1), ("dense", 1), ("salad", 2), ("dense", 2), ("salad-in-turn", 2)),
        *(("ddp", 1), ("ddp", 2), ("fsdp2", 1), ("fsdp2", 2)),
    ]
    assert all(row["error"] is None for row in rows)
    assert all(row["error_to_one_gpu"] < 1e-5 for row in rows if row["pass"] == "denoising step" and row["degree"] == 2)
