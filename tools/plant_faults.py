"""Plant faults one at a time in a copy of the tree, and see which test notices each.

    python tools/plant_faults.py --json build/faults.json            # all, a table on stdout; exits 1 if one is missed
    python tools/plant_faults.py --only "gate" --tree ../another-clone

The faults stand in tools/planted_faults.py. Each is planted in a copy; the tests that should notice run there, one file
after the other, until one fails. A fault whose code is not found is an error too: then the list is out of date.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.planted_faults import FAULTS, Fault

ROOT = Path(__file__).resolve().parents[1]
PRODUCT = ("salad_compile", "passes", "kernels")
SECONDS = 900  # for the tests of one file


def product_files(tree: Path) -> list[Path]:
    """Every file of the product, once: the links inside salad_compile/ are passed over."""
    return [
        path
        for folder in PRODUCT
        for path in sorted((tree / folder).rglob("*.py"))
        if folder != "salad_compile" or not {"passes", "kernels"} & set(path.relative_to(tree).parts)
    ]


def plant(fault: Fault, tree: Path) -> Path | None:
    """Write the fault into the tree; the file that has it now, or None if its code is nowhere."""
    for found, planted in fault.edits:
        for path in product_files(tree):
            near = path.relative_to(tree).as_posix()
            text = path.read_text(encoding="utf-8")
            if found in text and (fault.room.split("/")[0] != "kernels" or near.startswith(fault.room)):
                path.write_text(text.replace(found, planted, 1), encoding="utf-8")
                return path
    return None


def test_files(fault: Fault, tree: Path) -> list[str]:
    """The test files that should notice, without repetition."""
    found = [path.relative_to(tree).as_posix() for pattern in fault.tests for path in sorted(tree.glob(pattern))]
    return [name for name in dict.fromkeys(found) if name.rpartition("/")[2].startswith("test_")]


def run_tests(name: str, fault: Fault, tree: Path, python_path: str) -> subprocess.CompletedProcess[str]:
    """Run a test file, or one test, until the first failure. Raises subprocess.TimeoutExpired."""
    environment = {**os.environ, "PYTHONPATH": python_path, "OMP_NUM_THREADS": "1"}
    if fault.interpreted:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--no-header", "-rfE", name]
    return subprocess.run(
        command, cwd=tree, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
    )


def passes(name: str, fault: Fault, tree: Path, python_path: str) -> bool:
    """Whether a test passes without the fault: a test that fails anyway notices nothing."""
    return run_tests(name.split(" ")[0], fault, tree, python_path).returncode == 0


def first_failure(fault: Fault, tree: Path, python_path: str) -> str:
    """The id of the first test that fails, or the empty string."""
    for name in test_files(fault, tree):
        try:
            run = run_tests(name, fault, tree, python_path)
        except subprocess.TimeoutExpired:
            return f"{name} (no end within {SECONDS} s)"
        if run.returncode not in (0, 5):  # 5: no test was collected
            lines = [line for line in run.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
            return lines[0].split(" ")[1] if lines else f"{name} (pytest ended with {run.returncode})"
    return ""


def judge(
    faults: Sequence[Fault], tree: Path, python_path: Callable[[Path], Path] = lambda copy: copy
) -> Iterator[dict[str, object]]:
    """One row for each fault: its name, room, file, the test that noticed ("" if none) and the seconds it took.

    Args:
        python_path: the folder from which a copy of the tree can be imported.
    """
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        copy = Path(folder) / "tree"
        shutil.copytree(
            tree,
            copy,
            symlinks=True,
            ignore=shutil.ignore_patterns(".git", ".venv", "build", "__pycache__", ".*_cache"),
        )
        importable = str(python_path(copy))
        for fault in faults:
            start = time.perf_counter()
            path = plant(fault, copy)
            if path is None:
                yield {"fault": fault.name, "room": fault.room, "file": "", "noticed": "", "seconds": 0.0}
                continue
            original = tree / path.relative_to(copy)
            try:
                noticed = first_failure(fault, copy, importable)
            finally:
                shutil.copy(original, path)
            if noticed and not passes(noticed, fault, copy, importable):
                noticed = f"nobody: {noticed} fails without the fault too"
            yield {
                "fault": fault.name,
                "room": fault.room,
                "file": str(path.relative_to(copy)),
                "noticed": noticed,
                "seconds": round(time.perf_counter() - start, 1),
            }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns 1 if a fault was missed or its code was not found."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tree", type=Path, default=ROOT, help="the clone to plant in a copy of (this one)")
    parser.add_argument("--only", default="", help="faults whose name holds this text")
    parser.add_argument("--json", type=Path, help="write all rows there")
    options = parser.parse_args(arguments)
    chosen = [fault for fault in FAULTS if options.only in fault.name]
    rows = []
    print("| fault | room | noticed by | s |\n| --- | --- | --- | --- |")
    for row in judge(chosen, options.tree.resolve()):
        rows.append(row)
        outcome = row["noticed"] or ("**missed**" if row["file"] else "**its code was not found**")
        print(f"| {row['fault']} | {row['room']} | {outcome} | {row['seconds']} |", flush=True)
        if options.json is not None:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0 if all(row["noticed"] and not str(row["noticed"]).startswith("nobody") for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
