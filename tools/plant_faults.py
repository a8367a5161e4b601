"""Plant faults one at a time in a copy of the tree, and see which test notices each.

    python tools/plant_faults.py --json build/faults.json            # all, a table on stdout; exits 1 if one is missed
    python tools/plant_faults.py --only "gate" --tree ../another-clone --workers 4

The faults stand in tools/planted_faults.py. Each is planted in a copy; the tests that should notice run there, one file
after the other, until one fails. That test must pass in the same copy without the fault, or it noticed nothing. A fault
whose code is not found is an error too: then the list is out of date.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.planted_faults import FAULTS, Fault

ROOT = Path(__file__).resolve().parents[1]
PRODUCT = ("salad_compile", "passes", "kernels")
SECONDS = 900  # for the tests of one file


@dataclass(frozen=True)
class Row:
    """What became of one fault. file: where it was planted, "" if its code is nowhere. noticed: the test, or ""."""

    fault: str
    room: str
    file: str
    noticed: str
    seconds: float
    remark: str = ""


class Tree:
    """A copy of a tree in which faults are planted, one at a time."""

    def __init__(self, original: Path, folder: Path) -> None:
        self.original, self.root = original, folder
        left_out = shutil.ignore_patterns(".git", ".venv", "build", "__pycache__", ".*_cache", ".scratch")
        shutil.copytree(original, folder, symlinks=True, ignore=left_out)

    def product_files(self) -> list[Path]:
        """Every file of the product, once: the links inside salad_compile/ are passed over."""
        paths = [path for folder in PRODUCT for path in sorted((self.root / folder).rglob("*.py"))]
        links = tuple(str(self.root / "salad_compile" / name) + "/" for name in PRODUCT[1:])
        return [path for path in paths if not str(path).startswith(links)]

    def plant(self, fault: Fault) -> Path | None:
        """Write the fault into the copy; the file that has it now, or None if its code is nowhere."""
        for found, planted in fault.edits:
            for path in self.product_files():
                near = path.relative_to(self.root).as_posix()
                text = path.read_text(encoding="utf-8")
                if found in text and (fault.room.split("/")[0] != "kernels" or near.startswith(fault.room)):
                    path.write_text(text.replace(found, planted, 1), encoding="utf-8")
                    return path
        return None

    def test_files(self, fault: Fault) -> list[str]:
        """The test files that should notice, without repetition."""
        paths = [path for pattern in fault.tests for path in sorted(self.root.glob(pattern))]
        names = dict.fromkeys(path.relative_to(self.root).as_posix() for path in paths)
        return [name for name in names if name.rpartition("/")[2].startswith("test_")]

    def run_tests(self, name: str, fault: Fault) -> subprocess.CompletedProcess[str]:
        """Run a test file, or one test, until the first failure. Raises subprocess.TimeoutExpired."""
        path = os.pathsep.join([str(self.root), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        if fault.interpreted:
            environment["TRITON_INTERPRET"] = "1"
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--no-header", "-rfE", name]
        return subprocess.run(
            command, cwd=self.root, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
        )

    def first_failure(self, fault: Fault) -> str:
        """The id of the first test that fails, or the empty string."""
        for name in self.test_files(fault):
            run = self.run_tests(name, fault)
            if run.returncode not in (0, 5):  # 5: no test was collected
                lines = [line for line in run.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
                # an id may hold spaces; the message stands behind " - "
                return lines[0].partition(" ")[2].partition(" - ")[0] if lines else name
        return ""

    def judge(self, fault: Fault) -> Row:
        """Plant the fault, look for the test that notices, and take the fault out again."""
        start = time.perf_counter()
        path = self.plant(fault)
        if path is None:
            return Row(fault.name, fault.room, "", "", 0.0, "its code was not found")
        try:
            noticed, remark = self.first_failure(fault), ""
        except subprocess.TimeoutExpired:
            noticed, remark = "", f"no end within {SECONDS} s"
        shutil.copy(self.original / path.relative_to(self.root), path)
        if noticed and self.run_tests(noticed, fault).returncode:
            noticed, remark = "", f"{noticed} fails without the fault too"
        where = path.relative_to(self.root).as_posix()
        return Row(fault.name, fault.room, where, noticed, round(time.perf_counter() - start, 1), remark)


def judge_all(faults: Sequence[Fault], original: Path, workers: int) -> Iterator[Row]:
    """The row of each fault, as they come; each worker has a copy of its own."""
    with tempfile.TemporaryDirectory(prefix="faults-") as folder, ThreadPoolExecutor(workers) as pool:
        trees: queue.SimpleQueue[Tree] = queue.SimpleQueue()
        for number in range(workers):
            trees.put(Tree(original, Path(folder) / str(number)))

        def judge(fault: Fault) -> Row:
            tree = trees.get()
            try:
                return tree.judge(fault)
            finally:
                trees.put(tree)

        for done in as_completed([pool.submit(judge, fault) for fault in faults]):
            yield done.result()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns 1 if a fault was missed or its code was not found."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tree", type=Path, default=ROOT, help="the clone to plant in copies of (this one)")
    parser.add_argument("--only", default="", help="faults whose name holds this text")
    parser.add_argument("--json", type=Path, help="write all rows there")
    parser.add_argument("--workers", type=int, default=2, help="faults at a time (2)")
    options = parser.parse_args(arguments)
    chosen = [fault for fault in FAULTS if options.only in fault.name]
    rows: list[Row] = []
    print("| fault | room | noticed by | s |\n| --- | --- | --- | --- |")
    for row in judge_all(chosen, options.tree.resolve(), options.workers):
        rows.append(row)
        print(f"| {row.fault} | {row.room} | {row.noticed or '**missed** ' + row.remark} | {row.seconds} |", flush=True)
        if options.json is not None:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(list(map(asdict, rows)), indent=1) + "\n", encoding="utf-8")
    return 0 if all(row.noticed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
