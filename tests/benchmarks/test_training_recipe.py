"""The benchmark of the fine-tuning recipe runs, and compares what was predicted with what was measured."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from salad_compile.command_line import main as command_line
from tests.benchmarks.conftest import BENCHMARKS


@pytest.fixture
def recipe(modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("training_recipe")


def test_a_tiny_run_leaves_a_row(recipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def command(words: list[str], gib: float) -> str:
        capsys.readouterr()
        assert command_line(words) == 0
        return str(capsys.readouterr().out)

    output = tmp_path / "rows.json"
    recipe.main(["--quick", "--steps", "3", "--batch", "2", "--output", str(output)], command)
    (row,) = json.loads(output.read_text())
    assert row["predicted_step_s"] == row["expected"]["step_seconds"]
    assert 0 < row["measured_step_s"] < row["measured_s"]
    assert len(row["losses"]) == row["steps"] == 3
    assert row["settings"]["batch"] == 2


def test_predicted_beside_measured(recipe: Any) -> None:
    """A first step of 20 s, then 10 s each; 5 s of validation at the end."""
    log: list[dict[str, Any]] = [{"step": 0, "validation_loss": 1.0, "seconds": 3.0}]
    log += [{"step": n + 1, "loss": 1.0, "seconds": 23.0 + 10 * n, "peak_memory": 100 + n} for n in range(4)]
    log.append({"step": 4, "seconds": 58.0, "result": "done"})
    expected = {"steps": 4, "step_seconds": 11.0, "seconds": 60.0, "peak_memory": 103, "disk": 7}
    facts = recipe.compare(expected, log)
    assert (facts["measured_step_s"], facts["measured_s"], facts["measured_once_s"]) == (10.0, 58.0, 18.0)
    assert facts["predicted_once_s"] == 16.0
    assert facts["measured_paper_h"] == pytest.approx((1600 * 10 + 18) / 3600)
    assert facts["step_s_off"] == pytest.approx(0.1)
    assert facts["peak_bytes_off"] == 0
    assert "+10.0%" in recipe.report(facts)
