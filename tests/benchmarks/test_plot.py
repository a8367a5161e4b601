"""Pictures are drawn from whatever rows there are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.conftest import BENCHMARKS

pytest.importorskip("matplotlib")


def row_of(case: str, name: str, kind: str, **facts: Any) -> dict[str, Any]:
    shape = {"tokens": 8_192, "heads": 12, "head_dim": 128, "pass": "forward", "dtype": "bfloat16"}
    timings = {"median_ms": 2.0, "p10_ms": 1.9, "p90_ms": 2.2, "error": None}
    machine = {"device": "Imaginary", "torch": "2.11.0"}
    return {**machine, **shape, **timings, "case": case, "row": name, "kind": kind, **facts}


def draw(tmp_path: Path, rows: list[dict[str, Any]]) -> set[str]:
    (tmp_path / "attention_x.json").write_text(json.dumps(rows))
    command = [sys.executable, str(BENCHMARKS / "plot.py"), str(tmp_path / "attention_x.json"), "--folder"]
    subprocess.run([*command, str(tmp_path)], check=True, timeout=600)
    pictures = list(tmp_path.glob("*.png"))
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)
    return {picture.name for picture in pictures}


def test_all_pictures(tmp_path: Path) -> None:
    sparse: dict[str, Any] = {"sparsity": 0.9, "measured_sparsity": 0.9, "speedup": 4.0, "tflops": 400.0}
    rows = [row_of(f"length-{n}", "operator forward", "salad", **sparse | {"tokens": n}) for n in (8_192, 5_120)]
    rows += [row_of("sparsity", "operator forward", "salad", **sparse | {"measured_sparsity": s}) for s in (0.8, 0.5)]
    rows += [
        row_of("1.3B-480p", "matmul 8192", "ceiling", tflops=800.0),
        row_of("1.3B-480p", "dense SDPA cuDNN", "dense", tflops=600.0, sparsity=0.0),
        row_of("1.3B-480p", "block-sparse forward", "salad", **sparse),
        {**row_of("1.3B-480p", "SLA", "rival"), "error": "not installed"},
    ]
    assert draw(tmp_path, rows) == {f"attention_x_{name}.png" for name in ("length", "sparsity", "tflops")}


def test_rows_that_are_missing_are_not_drawn(tmp_path: Path) -> None:
    rows = [row_of("1.3B-480p", "dense SDPA cuDNN", "dense", tflops=600.0, sparsity=0.0)]
    assert draw(tmp_path, rows) == {"attention_x_tflops.png"}
