"""docs/composition.md says what its tests found, and nothing that no test has tried."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from tools import composition, composition_gpu
from tools.composition import CELLS, PAGE, REQUIREMENTS, ROOT
from tools.support_table import UnusableError, read_rows

STALE = f"run: {composition.COMMAND}"


def test_the_page_has_a_row_for_each_cell() -> None:
    text = PAGE.read_text()
    rows = read_rows(text)
    assert [(row["beside SALAD"], row["how"]) for row in rows] == [(cell.beside, cell.how) for cell in CELLS], STALE
    for row, cell in zip(rows, CELLS, strict=True):
        assert f"\n{row['test']}. `{cell.test}`\n" in text, STALE
        answers = ("yes" if cell.works else "no, an error", "not run here: ")
        assert row["works"].startswith(answers), STALE
    assert composition.packages() in text, STALE


@pytest.mark.parametrize("test", [cell.test for cell in (*CELLS, *composition_gpu.CELLS)])
def test_each_test_exists(test: str) -> None:
    file, _, name = test.partition("::")
    tree = ast.parse((ROOT / file).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_outcomes_become_answers() -> None:
    outcomes: dict[str, str] = {}
    for outcome in ("yes", "no (needs a GPU)", "yes"):
        composition.add_outcome(outcomes, "a", outcome)
    assert composition.Cell("x", "how", "a").answer(outcomes) == "not run here: needs a GPU"
    composition.add_outcome(outcomes, "a", "no")
    composition.add_outcome(outcomes, "a", "yes")
    assert outcomes["a"] == "no"
    assert composition.Cell("x", "how", "b").answer({"b": "yes"}) == "yes"
    assert composition.Cell("x", "how", "b", works=False).answer({"b": "yes"}) == "no, an error"
    assert composition.cell_of(f"{CELLS[0].test}[x-y]") == CELLS[0].test
    assert composition.cell_of("tests/other.py::test_other") is None


@pytest.mark.parametrize(("ran", "message"), [(False, "were not run"), (True, "failed")])
def test_an_incomplete_or_failed_run_writes_nothing(ran: bool, message: str) -> None:
    before = PAGE.read_text()
    outcomes = {cell.test: "no" for cell in CELLS} if ran else {}
    with pytest.raises(UnusableError, match=message):
        composition.write(outcomes, "")
    assert PAGE.read_text() == before


def test_requirements_have_versions() -> None:
    lines = [line for line in REQUIREMENTS.read_text().splitlines() if not line.startswith("#")]
    assert all("==" in line for line in lines)


# --- what a GPU has shown ---------------------------------------------------------------------------------------------

MACHINE = {"command": "python benchmarks/composition.py", "commit": "0123456789abcdef", "device": "NVIDIA Imaginary"}
WHERE = MACHINE | {"torch": "2.11.0", "dense_attention": "FlashAttention-3", "case": "14B-720p", "error": None}


def write_steps(results: Path, *rows: dict[str, Any], model: str = "") -> None:
    (results / f"composition{model}_imaginary.json").write_text(json.dumps([WHERE | row for row in rows]))


def test_the_page_and_the_speeds_are_what_the_rows_say() -> None:
    hint = "run: python -m tools.composition_gpu"
    assert composition_gpu.render() in PAGE.read_text(), hint
    assert composition_gpu.render_speed() in composition_gpu.SPEED.read_text(), hint


def test_without_rows_nothing_is_claimed(tmp_path: Path) -> None:
    block = composition_gpu.render(tmp_path)
    assert block.count("| not tried |") == len(composition_gpu.CELLS)
    assert "were not timed yet" in block
    assert "not timed yet" in composition_gpu.render_speed(tmp_path)


def test_whole_steps_and_loops_beside_dense(tmp_path: Path) -> None:
    write_steps(
        tmp_path,
        {"row": "dense, one step", "median_ms": 9876.0},
        {"row": "SALAD, one step", "median_ms": 4033.0, "first_call_s": 19.6},
        {"row": "SALAD with fp8 weights, one step", "median_ms": 3086.0},
        {"row": "dense, 4 steps", "loop_s": 40.0, "steps": 4, "whole_steps": 4, "distance": 0.0},
        {"row": "SALAD, 4 steps", "loop_s": 16.0, "steps": 4, "whole_steps": 4, "distance": 0.1239},
        {"row": "SALAD with cache-dit, 50 steps", "loop_s": 99.0, "steps": 50, "whole_steps": 25, "distance": None},
    )
    small = [
        {"row": "dense, one step", "median_ms": 500.0},
        {"row": "SALAD with fp8 weights, one step", "median_ms": 100.0},
    ]
    write_steps(tmp_path, *[row | {"case": "1.3B-480p"} for row in small], model="_small")
    block = composition_gpu.render(tmp_path)
    assert "| dense, one step | 9.88 | 1.00x |  |  |  |" in block
    assert "| SALAD, one step | 4.03 | 2.45x | 20 |  |  |" in block
    assert "| SALAD, 4 steps | 16.00 | 2.50x |  | 4 of 4 | 0.124 |" in block
    assert "| SALAD with cache-dit, 50 steps | 99.00 | 4.99x (dense derived) |  | 25 of 50 |  |" in block
    goals = "Aimed at 3.2x for SALAD with fp8 weights: 3.20x (Wan2.1 14B, 720p, one step), reached."
    assert goals in block
    speed = composition_gpu.render_speed(tmp_path)
    assert goals in speed
    assert "One step of Wan2.1 14B, 720p, 81 frames: dense 9.88 s, SALAD 4.03 s, SALAD with fp8 weights 3.09 s" in speed
    assert "torchao's own settings" in block, "no graphs were counted"
    assert "No loop with cache-dit" not in block
    assert "5x for SALAD with cache-dit: 4.99x (Wan2.1 14B, 720p, 50 steps), not reached." in block
    assert "NVIDIA Imaginary, torch 2.11.0, commit 0123456789ab. Dense runs on FlashAttention-3" in block


def test_a_dense_loop_that_was_timed_counts_and_failures_are_shown(tmp_path: Path) -> None:
    write_steps(
        tmp_path,
        {"row": "dense, one step", "median_ms": 500.0},
        {"row": "SALAD with fp8 weights, one step", "error": "ImportError: torchao"},
        {"row": "dense, 50 steps", "loop_s": 26.0, "steps": 50, "whole_steps": 50, "distance": 0.0},
        {"row": "SALAD with cache-dit, 50 steps", "loop_s": 5.2, "steps": 50, "whole_steps": 20, "distance": 0.25},
    )
    block = composition_gpu.render(tmp_path)
    assert "| SALAD with cache-dit, 50 steps | 5.20 | 5.00x |  | 20 of 50 | 0.250 |" in block
    assert "- SALAD with fp8 weights, one step: ImportError: torchao" in block
    assert "3.2x" not in block
    assert "torchao's own settings" not in block


def test_a_failure_and_what_was_not_timed_are_said(tmp_path: Path) -> None:
    write_steps(
        tmp_path, {"row": "dense, one step", "median_ms": 500.0}, {"row": "SALAD, one step", "median_ms": 250.0}
    )
    failed = composition_gpu.CELLS[-1]
    rows = [composition_gpu.outcome_row(failed.test, "no", "AssertionError", 0.0)]
    (tmp_path / "composition_checks_imaginary.json").write_text(json.dumps(rows))
    block = composition_gpu.render(tmp_path)
    assert f"| {failed.beside} | failed | {failed.how}. {failed.failed} |" in block
    assert "No loop with cache-dit" in block
    (tmp_path / "composition_checks_imaginary.json").write_text(json.dumps([rows[0] | {"outcome": "yes"}]))
    assert failed.failed not in composition_gpu.render(tmp_path)


def test_the_benchmark_makes_rows_of_this_kind(tmp_path: Path) -> None:
    """Names and fields, without running it: tests/benchmarks does not time loops."""
    source = (ROOT / "benchmarks" / "composition.py").read_text()
    for part in ("dense", "SALAD", "SALAD with fp8 weights"):
        assert f'"{part}, one step"' in source
    assert 'f"SALAD with cache-dit, {many} steps"' in source
    for field in ("median_ms", "loop_s", "steps", "whole_steps", "distance", "dense_attention", "case", "row"):
        assert f'"{field}":' in source


def test_outcomes_of_checks_are_rows_and_the_worst_parameter_counts(tmp_path: Path) -> None:
    test = composition_gpu.CELLS[0].test
    rows = [composition_gpu.outcome_row(f"{test}[{each}]", "yes", "", 1.0) for each in "ab"]
    assert composition_gpu.answers(rows)[test] == "yes"
    skipped = composition_gpu.outcome_row(f"{test}[c]", "no (needs a GPU)", "", 0.0)
    assert composition_gpu.answers([*rows, skipped])[test] == "not run: needs a GPU"
    failed = composition_gpu.outcome_row(f"{test}[d]", "no", "AssertionError", 0.0)
    assert composition_gpu.answers([failed, skipped, *rows])[test] == "failed"
    (tmp_path / "composition_checks_imaginary.json").write_text(json.dumps(rows))
    block = composition_gpu.render(tmp_path)
    assert f"| {composition_gpu.CELLS[0].beside} | yes |" in block
    assert composition_gpu.step_files(tmp_path) == []
