"""Rows as JSON lines, each appended in one write: several processes may write, and a kill loses only its own row."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
Row = dict[str, Any]


def default_path(device: torch.device, name: str = "experiment") -> Path:
    """<name>_<gpu>.jsonl. A CPU run only checks that the scripts work, and is not kept."""
    if device.type != "cuda":
        return ROOT / "out" / f"{name}_cpu.jsonl"
    words = re.split(r"[^A-Za-z0-9]+", torch.cuda.get_device_name(device).replace("NVIDIA", ""))
    kind = next((word for word in words if re.search(r"\d", word)), "gpu").lower()
    return RESULTS / f"{name}_{kind}.jsonl"


def about_this_run(device: torch.device) -> Row:
    """Facts that every row repeats, so that it can be read by itself."""
    return {
        "command": " ".join(["python", *sys.argv]),
        "commit": _commit(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "date": time.strftime("%Y-%m-%d"),
    }


def append(path: Path, row: Row) -> None:
    """Add one line, in one write, under a lock."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def key(row: Row) -> tuple[str, int, float]:
    """Arm, seed and learning rate: each combination has one row."""
    return row["arm"], row["seed"], row["settings"]["tune"]["rate"]


def read(path: Path) -> list[Row]:
    """All rows; of rows with one :func:`key` the last.

    Raises:
        ValueError: a line is not JSON. The last line may be cut off, by a kill.
    """
    if not path.exists():
        return []
    rows: dict[tuple[str, int, float], Row] = {}
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number}: {error}") from error
        rows[key(row)] = row
    return list(rows.values())


def _commit() -> str:
    """EXPERIMENT_COMMIT (for machines without the history), or the commit and whether the tree has changes."""
    if given := os.environ.get("EXPERIMENT_COMMIT"):
        return given
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return head.stdout.strip() + (" + changes" if changed.stdout.strip() else "")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
