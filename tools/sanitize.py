"""Every kernel under compute-sanitizer, on a GPU: does one leave its memory, or race?

    python -m tools.sanitize --output benchmarks/results/sanitizer_h200.json       about 3 minutes
    python -m tools.sanitize --page                                                docs/kernels.md, from the rows

Each call of `tests/kernels/gpu/small_calls.py` runs by itself first, so that its kernels are compiled, then under
memcheck and racecheck: in a process of its own with a time limit, several side by side. A row is written as each ends.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.support_table import table

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- sanitizer:begin -->", "<!-- sanitizer:end -->"
TOOLS = ("memcheck", "racecheck")
SANITIZER = ("compute-sanitizer", "/usr/local/cuda/bin/compute-sanitizer")
FAULT = 99  # exit status for anything found
# each tool's last line; racecheck's hazards are errors or, where they may be wanted, warnings
SUMMARIES = {
    "memcheck": re.compile(r"ERROR SUMMARY: (?P<errors>\d+) error"),
    "racecheck": re.compile(r"RACECHECK SUMMARY: \d+ hazards? displayed \((?P<errors>\d+) errors?, (?P<warnings>\d+)"),
}
KERNEL = re.compile(r"(?: in |at )(?:void )?([A-Za-z_]\w*)(?:\+0x|\(|:)")
Row = dict[str, Any]


def verdict(tool: str, status: int, printed: str) -> Row:
    """What a run has shown: "clean", "N errors", or why there is no answer."""
    found = next(reversed(list(SUMMARIES[tool].finditer(printed))), None)
    if found is None:
        return {"outcome": f"no answer (exit status {status})", "said": printed[-600:]}
    counts = {name: int(count) for name, count in found.groupdict().items()}
    if any(counts.values()):
        said = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        kernels = sorted(set(KERNEL.findall(printed)))[:6]
        return {"outcome": said, "kernels": kernels, "said": printed[:2000]}
    if status:
        return {"outcome": f"no answer (exit status {status})", "said": printed[-600:]}
    return {"outcome": "clean"}


def run(command: Sequence[str], seconds: float, **environment: str) -> tuple[int, str, float]:
    """Status, both outputs and seconds; status 124 beyond the time limit, when the process is killed."""
    start = time.monotonic()
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
        )
        return done.returncode, done.stdout, time.monotonic() - start
    except subprocess.TimeoutExpired as error:
        printed = error.stdout or b""
        return 124, printed.decode(errors="replace") if isinstance(printed, bytes) else printed, seconds


def check(name: str, tools: Sequence[str], seconds: float, sanitizer: str) -> list[Row]:
    """The rows of one call: without the sanitizer, which must succeed, and under each tool."""
    call = [sys.executable, "-m", "tests.kernels.gpu.small_calls", name]
    status, printed, took = run(call, seconds)
    if status:
        return [
            {"call": name, "tool": "none", "outcome": f"failed ({status})", "said": printed[-600:], "seconds": took}
        ]
    rows = []
    for tool in tools:
        watched = [sanitizer, "--tool", tool, "--error-exitcode", str(FAULT), "--print-limit", "20", *call]
        # memory of its own for each tensor, or what runs over one reaches the next unseen
        status, printed, took = run(watched, seconds, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        seen = {"outcome": f"stopped after {seconds:.0f} s"} if status == 124 else verdict(tool, status, printed)
        rows.append({"call": name, "tool": tool, **seen, "seconds": round(took, 1)})
    return rows


def render(results: Path = RESULTS) -> str:
    """The block of docs/kernels.md, markers included."""
    files = sorted(results.glob("sanitizer*.json"))
    if not files:
        return "\n".join([BEGIN, "Not run yet: `python -m tools.sanitize`.", END])
    rows: list[Row] = json.loads(files[-1].read_text())
    calls = list(dict.fromkeys(row["call"] for row in rows))
    cell = {(row["call"], row["tool"]): _cell(row) for row in rows}
    shown = [(name, *(cell.get((name, tool), cell.get((name, "none"), "-")) for tool in TOOLS)) for name in calls]
    about = rows[0]
    where = f"`python -m tools.sanitize`: {about['device']}, torch {about['torch']}, Triton {about['triton']}"
    return "\n".join([BEGIN, f"{where}, commit {about['commit'][:12]}.", "", table(("call", *TOOLS), shown), END])


def _cell(row: Row) -> str:
    kernels = ", ".join(f"`{name}`" for name in row.get("kernels", ()))
    return f"{row['outcome']} ({kernels})" if kernels else str(row["outcome"])


def _facts() -> Row:
    import torch
    import triton

    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": os.environ.get("BENCHMARK_COMMIT", ""),
        "date": time.strftime("%Y-%m-%d"),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 where anything but "clean" was found."""
    from tests.kernels.gpu.small_calls import CALLS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS / "sanitizer.json")
    parser.add_argument("--page", action="store_true", help="run nothing: write the table of docs/kernels.md")
    parser.add_argument("--tools", nargs="+", default=list(TOOLS), choices=TOOLS)
    parser.add_argument("--calls", nargs="+", default=[], metavar="WORD", help="those whose name holds one of these")
    parser.add_argument("--jobs", type=int, default=8, help="calls side by side")
    parser.add_argument("--seconds", type=float, default=90, help="limit of each run")
    options = parser.parse_args(arguments)
    if options.page:
        text = PAGE.read_text()
        PAGE.write_text(text[: text.index(BEGIN)] + render() + text[text.index(END) + len(END) :])
        return 0
    sanitizer = next((found for each in SANITIZER if (found := shutil.which(each))), None)
    if sanitizer is None:
        parser.error("compute-sanitizer was not found; it comes with CUDA")
    names = [name for name in CALLS if not options.calls or any(word in name for word in options.calls)]
    facts, rows = _facts(), []
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        tried = [pool.submit(check, name, options.tools, options.seconds, sanitizer) for name in names]
        for done in concurrent.futures.as_completed(tried):
            for row in done.result():
                print(f"{row['call']:40}{row['tool']:12}{row['seconds']:6.1f} s  {_cell(row)}", flush=True)
                rows.append(row | facts)
            order = {name: number for number, name in enumerate(names)}
            rows.sort(key=lambda row: order[row["call"]])
            options.output.write_text(json.dumps(rows, indent=1))
    return int(any(row["outcome"] != "clean" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
