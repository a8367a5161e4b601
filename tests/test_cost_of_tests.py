"""`--cost FILE` and its tables."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tools.cost_of_tests import GROUPS, cpu_seconds, read, table

ROWS = [
    ["tests/models/test_zoo.py::test_saved[Wan]", 1.5, 9.0],
    ["tests/models/test_zoo.py::test_saved[Mochi]", 2.5, 9.0],
    ["tests/passes/test_driver.py::test_order", 0.5, 9.0],
    ["tests/test_top.py::test_top", 0.25, 9.0],
]


def test_tables_add_up_what_belongs_together(tmp_path: Path) -> None:
    file = tmp_path / "cost.json"
    file.write_text(json.dumps(ROWS))
    assert read(file, GROUPS["room"]) == {"models": (2, 4.0), "passes": (1, 0.5), "(top)": (1, 0.25)}
    assert read(file, GROUPS["function"])["tests/models/test_zoo.py::test_saved"] == (2, 4.0)
    lines = table([read(file, GROUPS["room"]), {"passes": (1, 7.0)}], most=2).splitlines()
    assert lines[2:] == ["| all | 4 | 5 | 1 | 7 |", "| `passes` | 1 | 0 | 1 | 7 |", "| `models` | 2 | 4 | 0 | 0 |"]


def test_what_a_child_computes_counts() -> None:
    before = cpu_seconds()
    subprocess.run([sys.executable, "-c", "sum(range(20_000_000))"], check=True)
    assert cpu_seconds() - before > 0.1


def test_a_run_writes_down_every_test(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "cost.json"
    chosen = ["tests/test_cost_of_tests.py", "-k", "belongs_together", "-p", "no:xdist", "--cost", str(file)]
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout
    ((node, cpu, wall),) = json.loads(file.read_text())
    assert node == "tests/test_cost_of_tests.py::test_tables_add_up_what_belongs_together"
    assert cpu >= 0
    assert wall > 0
