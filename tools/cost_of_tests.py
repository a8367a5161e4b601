"""What the tests cost in CPU seconds: `pytest --cost FILE` writes it down, this script makes tables of it.

    make test PYTEST_ARGS="--cost out/cost.json"
    python tools/cost_of_tests.py out/cost.json              # by room
    python tools/cost_of_tests.py before.json out/cost.json  # two runs side by side
    python tools/cost_of_tests.py --by test out/cost.json    # the dearest tests

CPU seconds are those of the test's process and of all processes below it, so that they compare on a busy machine too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

PROPERTY = "cost"
TICK = os.sysconf("SC_CLK_TCK")
GROUPS: Mapping[str, Callable[[str], str]] = {
    "room": lambda node: "/".join(node.partition("::")[0].split("/")[1:-1][:1]) or "(top)",
    "folder": lambda node: node.partition("::")[0].rpartition("/")[0],
    "file": lambda node: node.partition("::")[0],
    "function": lambda node: node.partition("[")[0],
    "test": lambda node: node,
}


def cpu_seconds() -> float:
    """CPU time of this process, of its children that have ended, and of all processes below it that still run."""
    spent, children = {}, defaultdict(list)
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ends just now
                fields = (process / "stat").read_text().rpartition(")")[2].split()
                children[int(fields[1])].append(int(process.name))
                spent[int(process.name)] = sum(map(int, fields[11:15])) / TICK
    family = [os.getpid()]
    for member in family:
        family.extend(children[member])
    return sum(spent[member] for member in family if member in spent)


class CostOfTests:
    """The plugin: workers measure, and the process that sees all reports writes the file."""

    def __init__(self, file: Path, *, writes: bool) -> None:
        self.file, self.writes = file, writes
        self.rows: list[tuple[str, float, float]] = []
        self.begun: tuple[float, float] = 0.0, 0.0

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logstart(self) -> None:
        self.begun = cpu_seconds(), time.perf_counter()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
        report = yield
        if call.when == "teardown":
            spent = cpu_seconds() - self.begun[0], time.perf_counter() - self.begun[1]
            report.user_properties.append((PROPERTY, spent))  # type: ignore[attr-defined]
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, value in report.user_properties:
            if self.writes and name == PROPERTY and report.when == "teardown":
                cpu, wall = value  # type: ignore[misc]
                self.rows.append((report.nodeid, round(cpu, 3), round(wall, 3)))

    def pytest_sessionfinish(self) -> None:
        if self.writes:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text("[\n" + ",\n".join(json.dumps(row) for row in sorted(self.rows)) + "\n]\n")


def read(file: Path, group: Callable[[str], str]) -> dict[str, tuple[int, float]]:
    """Group -> how many tests it has, and their CPU seconds."""
    found: dict[str, list[float]] = defaultdict(list)
    for node, cpu, _ in json.loads(file.read_text()):
        found[group(node)].append(cpu)
    return {name: (len(costs), sum(costs)) for name, costs in found.items()}


def table(runs: list[dict[str, tuple[int, float]]], most: int) -> str:
    """Rows in Markdown, the dearest first; number of tests and CPU seconds of each run."""
    nothing = (0, 0.0)
    names = sorted(set().union(*runs), key=lambda name: -max(run.get(name, nothing)[1] for run in runs))
    rows: list[list[Any]] = [["all", *(sum(column) for run in runs for column in zip(*run.values(), strict=True))]]
    rows += [[f"`{name}`", *(cell for run in runs for cell in run.get(name, nothing))] for name in names[:most]]
    heads = ["", *(head for _ in runs for head in ("tests", "CPU s"))]
    lines = [heads, ["---"] * len(heads)]
    lines += [[cell if isinstance(cell, str) else f"{cell:.0f}" for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, help="what --cost wrote, the older run first")
    parser.add_argument("--by", choices=GROUPS, default="room")
    parser.add_argument("--most", type=int, default=40, help="rows of the table")
    given = parser.parse_args()
    print(table([read(file, GROUPS[given.by]) for file in given.files], given.most))


if __name__ == "__main__":
    main()
