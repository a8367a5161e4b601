"""The end-to-end benchmark runs and leaves complete rows."""

from __future__ import annotations

import json
from pathlib import Path

from tests.benchmarks.conftest import BENCHMARKS
from tests.end_to_end.scripts import run_script


def rows_of(output: Path, *arguments: str) -> list[dict[str, object]]:
    options = ["--quick", "--device", "cpu", "--output", str(output), *arguments]
    run_script(BENCHMARKS / "transformer.py", *options, said=output.with_suffix(".said"))
    rows: list[dict[str, object]] = json.loads(output.read_text())
    return rows


def test_quick_run_writes_complete_rows(tmp_path: Path) -> None:
    # Inductor's C++ takes a minute here, and other tests hold that compiled models are right
    short = ["--compiler", "eager", "--models", "1.3B-480p", "--sparsity", "0.5", "0.3"]
    rows = rows_of(tmp_path / "rows.json", *short)
    assert [(row["kind"], row["pass"], row["sparsity"]) for row in rows] == [
        ("dense", "denoising step", 0.0),
        ("salad", "denoising step", 0.5),
        ("dense", "training step", 0.0),
        ("salad", "training step", 0.5),
        ("dense", "denoising step", 0.0),
        ("salad", "denoising step", 0.3),
    ]
    for row in rows:
        assert row["error"] is None
        assert len(row["timings_ms"]) == 2  # type: ignore[arg-type]
        assert row["layers"] == 1
        assert row["first_call_s"] > 0  # type: ignore[operator]
        for name in ("command", "commit", "torch", "triton", "python", "device", "seed", "tokens", "weights"):
            assert name in row
    assert all(row["speedup"] > 0 for row in rows if row["kind"] == "salad")  # type: ignore[operator]
    assert all(0 < row["measured_sparsity"] < 0.6 for row in rows if row["kind"] == "salad")  # type: ignore[operator]
    assert [row.get("lora") for row in rows] == [None, "merged", None, "unmerged", None, "merged"]
    assert all(("first_call_cached_s" in row) == (number < 2) for number, row in enumerate(rows))


def test_other_settings_are_timed_in_turn_with_the_default(tmp_path: Path) -> None:
    short = ["--compiler", "eager", "--models", "1.3B-480p", "--sparsity", "0.5", "--no-training"]
    beside = ["--beside", "compensation=tail", "--beside", "compensation=tail", "prepare-operands=on"]
    rows = rows_of(tmp_path / "rows.json", *short, *beside)
    told = [(row["kind"], row["row"], row["compensation"], row["prepare_operands"]) for row in rows]
    assert told == [
        ("dense", "dense, torch.compile", "", ""),
        ("salad", "SALAD, torch.compile", "none", "auto"),
        ("variant", "SALAD, compensation=tail", "tail", "auto"),
        ("variant", "SALAD, compensation=tail, prepare_operands=on", "tail", "on"),
    ]
    assert all(row["error"] is None and len(row["timings_ms"]) == 2 for row in rows)  # type: ignore[arg-type]


def test_what_the_budget_does_not_reach_is_said(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "rows.json", "--budget-seconds", "0", "--sparsity", "0.5", "--no-training")
    assert [row["case"] for row in rows] == ["1.3B-480p", "14B-720p", "1.3B-720p"]
    assert all(str(row["error"]).startswith("left out") for row in rows)
