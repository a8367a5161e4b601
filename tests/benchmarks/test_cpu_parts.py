"""Where the CPU engine's time goes: a quick run names every part, and they add up to the call."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.benchmarks.conftest import BENCHMARKS
from tests.end_to_end.scripts import run_script


def test_parts_add_up_to_the_call(tmp_path: Path) -> None:
    run_script(BENCHMARKS / "cpu_parts.py", "--quick", "--output", str(tmp_path / "parts.json"), said=tmp_path / "said")
    rows = json.loads((tmp_path / "parts.json").read_text())
    assert [row["dtype"] for row in rows] == ["float32", "bfloat16"]
    for row in rows:
        assert row["together_ms"] == pytest.approx(sum(row["parts_ms"].values()))
        assert {"scores", "softmax", "weights times values", "gathering blocks"} < set(row["parts_ms"])
        assert min(row["parts_ms"].values()) > 0
