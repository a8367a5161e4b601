"""What a GPU has shown of other things beside SALAD: a block in docs/composition.md, and a sentence in docs/speed.md.

    python -m tools.composition_gpu        writes both, from benchmarks/results

There `composition_checks_<device>.json` are outcomes of `tests/composition/test_gpu.py`, other `composition*.json` the
rows of `benchmarks/composition.py`. `tests/test_composition_table.py` holds both texts against the rows.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.support_table import table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE, SPEED = ROOT / "docs" / "composition.md", ROOT / "docs" / "speed.md"
BEGIN, END = "<!-- gpu:begin -->", "<!-- gpu:end -->"
SPEED_BEGIN, SPEED_END = "<!-- beside:begin -->", "<!-- beside:end -->"
CHECKS, STEPS = "composition_checks_*.json", "composition_*.json"
CHECK_COMMAND = "python -m pytest tests/composition/test_gpu.py --composition-outcomes FILE"
STEP_COMMAND = "python benchmarks/composition.py"
TESTS = "tests/composition/test_gpu.py"
CASES = {"1.3B-480p": "Wan2.1 1.3B, 480p", "1.3B-720p": "Wan2.1 1.3B, 720p", "14B-720p": "Wan2.1 14B, 720p"}
GOALS = {"SALAD with fp8 weights": 3.2, "SALAD with cache-dit": 5.0}
PACKAGES = ("torch", "triton", "diffusers", "bitsandbytes", "sageattention")
Row = dict[str, Any]


@dataclass(frozen=True)
class Check:
    """One row of the table of checks.

    Attributes:
        beside, how, test: what runs beside SALAD, what to do, and the test that shows it. failed: what is known of the
            failure, where the newest rows have one.
    """

    beside: str
    how: str
    test: str
    failed: str = ""


MARK = "`torch.compiler.cudagraph_mark_step_begin()`"
CELLS = (
    Check(
        "CUDA graphs, the whole model",
        '`torch.compile(model, backend="salad", mode="reduce-overhead")`; copy an output that is to outlive the next '
        "forward",
        f"{TESTS}::test_cuda_graphs_of_the_whole_model",
    ),
    Check(
        "CUDA graphs, block by block",
        f'`compile_pipeline(pipe, mode="reduce-overhead")`, and {MARK} before each forward',
        f"{TESTS}::test_cuda_graphs_block_by_block",
    ),
    Check(
        "the same without that call",
        "right, or torch's error about an output that was overwritten by a subsequent run",
        f"{TESTS}::test_cuda_graphs_block_by_block_without_marks_are_right_or_an_error",
    ),
    Check(
        "bitsandbytes, 8 and 4 bits",
        "`load` or `convert` a model that holds them; blocks compile to one graph",
        f"{TESTS}::test_bitsandbytes_on_a_gpu",
    ),
    Check(
        "context parallelism (Ulysses) over two GPUs",
        "`enable_parallelism`, then `salad_compile.parallelise`, then compile block by block",
        f"{TESTS}::test_context_parallelism_over_two_gpus",
    ),
    Check(
        "SageAttention",
        "nothing: its function becomes SALAD where it is self-attention, and is what cross-attention and dense steps "
        "run on",
        f"{TESTS}::test_sage_attention_on_a_gpu",
        "The text had 96 tokens, and SageAttention 1.0.6 does not mask the rest of a last block of 64 keys: it is "
        "wrong there by itself, by 4.03 % of this output as computed from its source; 4.04 % were seen. The test has "
        "128 now, and was not run on a GPU since",
    ),
)


# --- outcomes of the checks -------------------------------------------------------------------------------------------


def outcome_row(test: str, outcome: str, error: str, seconds: float) -> Row:
    """One outcome, and where it was found. `outcome` is "yes", "no (reason)" of a skip, or "no" of a failure."""
    import torch

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "test": test,
        "outcome": outcome,
        "error": error,
        "seconds": round(seconds, 1),
        "command": CHECK_COMMAND,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU",
        "python": sys.version.split()[0],
        "commit": os.environ.get("BENCHMARK_COMMIT", ""),
        "date": time.strftime("%Y-%m-%d"),
        **versions,
    }


def answers(rows: list[Row]) -> dict[str, str]:
    """Test -> what the table says. Of several parameters the worst counts: a failure, then what was not run."""
    found: dict[str, list[str]] = {}
    for row in rows:
        found.setdefault(row["test"].partition("[")[0], []).append(row["outcome"])
    said = {}
    for check in CELLS:
        outcomes = found.get(check.test, ["no (not tried)"])
        left_out = [each for each in outcomes if each.startswith("no (")]
        worst = "no" if "no" in outcomes else left_out[0] if left_out else "yes"
        said[check.test] = {"yes": "yes", "no": "failed"}.get(worst, f"not run: {worst[4:-1]}")
    return {test: "not tried" if answer == "not run: not tried" else answer for test, answer in said.items()}


def _checks(results: Path) -> list[str]:
    files = sorted(results.glob(CHECKS))
    rows: list[Row] = json.loads(files[-1].read_text()) if files else []
    said = answers(rows)
    lines = [f"Not run on a GPU yet: `{CHECK_COMMAND}`."]
    if rows:
        newest = rows[-1]
        there = ", ".join(f"{name} {newest[name]}" for name in PACKAGES if newest[name])
        commit = f", commit {newest['commit'][:12]}" if newest["commit"] else ""
        lines = [f"`{CHECK_COMMAND}`: {newest['device']}, {there}{commit}. A model of two blocks and 1,280 tokens."]
    failures = {check.test: f". {check.failed}" for check in CELLS if check.failed and said[check.test] == "failed"}
    listed = [(check.beside, said[check.test], check.how + failures.get(check.test, "")) for check in CELLS]
    return [*lines, "", table(("beside SALAD", "works on a GPU", "how"), listed)]


# --- whole steps and loops --------------------------------------------------------------------------------------------


def step_files(results: Path) -> list[Path]:
    """The files of `benchmarks/composition.py`."""
    return sorted(set(results.glob(STEPS)) - set(results.glob(CHECKS)))


def _kind(row: Row) -> tuple[str, str]:
    """What ran, and how long: "SALAD with cache-dit", "50 steps"."""
    what, _, length = row["row"].rpartition(", ")
    return what, length


def _seconds(row: Row) -> float:
    return float(row["loop_s"]) if "loop_s" in row else float(row["median_ms"]) / 1000


@dataclass(frozen=True)
class Timed:
    """A row and the dense one beside it.

    Attributes:
        dense: seconds of dense for as many steps; None without any. derived: whether these are so many times one step.
    """

    row: Row
    dense: float | None
    derived: bool

    @property
    def ratio(self) -> float | None:
        """Dense over this row."""
        return None if self.dense is None else self.dense / _seconds(self.row)


def timed(rows: list[Row]) -> list[Timed]:
    """The rows with a time, each beside dense for as many steps: measured, or so many times the one step."""
    there = {_kind(row): row for row in rows if not row["error"]}
    one = there.get(("dense", "one step"))
    found = []
    for (_, length), row in there.items():
        dense = there.get(("dense", length))
        seconds = _seconds(dense) if dense else row["steps"] * _seconds(one) if one else None
        found.append(Timed(row, seconds, derived=dense is None))
    return found


def _table(path: Path) -> list[str]:
    rows: list[Row] = json.loads(path.read_text())
    about = rows[0]
    lines = [
        f"{CASES.get(about['case'], about['case'])}, 81 frames, `{re.sub(' --output [^ ]+', '', about['command'])}`: "
        f"{about['device']}, torch {about['torch']}, commit {about['commit'][:12]}. Dense runs on "
        f"{about['dense_attention'] or 'the attention of torch'}, the fastest in this run.",
        "",
    ]
    shown = []
    for each in timed(rows):
        row, distance = each.row, each.row.get("distance")
        whole = f"{row['whole_steps']} of {row['steps']}" if "steps" in row else ""
        ratio = "" if each.ratio is None else f"{each.ratio:.2f}x" + (" (dense derived)" if each.derived else "")
        apart = "" if distance is None or _kind(row)[0] == "dense" else f"{distance:.3f}"
        first = f"{row['first_call_s']:.0f}" if "first_call_s" in row else ""
        shown.append((row["row"], f"{_seconds(row):.2f}", ratio, first, whole, apart))
    heading = (
        "what",
        "seconds",
        "dense / this",
        "first call, seconds",
        "steps not from a cache",
        "distance from dense",
    )
    lines.append(table(heading, shown))
    failed = [f"- {row['row']}: {row['error'][:200]}" for row in rows if row["error"]]
    return [*lines, *(["", "Without a time:", "", *failed] if failed else [])]


def _steps(results: Path) -> list[str]:
    files = step_files(results)
    if not files:
        return [f"Whole steps beside fp8 weights and a cache were not timed yet: `{STEP_COMMAND}`."]
    text = [
        "Whole steps and loops, 90 % of the key blocks left out, random weights of the real sizes: seconds are those "
        "of the real model, but what a cache leaves out, and how far outputs are from dense (norm of the difference "
        "over that of dense), is not what trained weights would give. Loops have no guidance, text encoder or VAE. "
        '"Dense derived": so many times one step.',
    ]
    for path in files:
        text += ["", *_table(path)]
    rows = [row for path in files for row in json.loads(path.read_text())]
    return [*text, "", *_unmeasured(rows), *goals(files)]


def _unmeasured(rows: list[Row]) -> list[str]:
    """What one has to know to read rows that are there, or are not."""
    said = []
    if any("fp8" in row["row"] and not row["error"] and "graphs" not in row for row in rows):
        said.append(
            "The first call with fp8 weights was made with torchao's own settings, which let Inductor time variants of "
            "every kernel. The script leaves them out now (`--tune` switches them on), and counts the graphs; that was "
            "not timed."
        )
    if not any("cache-dit" in row["row"] and not row["error"] for row in rows):
        said.append(
            "No loop with cache-dit has ended in the time there was: 50 steps of 14B had not after 185 s, compilation "
            "and three steps before them among these, and by cache-dit's default for Wan, which takes every second "
            "forward for one without a prompt (the script says now that there is none). So nothing is claimed of it, "
            "nor of few-step loops: `python benchmarks/composition.py --only dense cached few`."
        )
    return [*said, ""] if said else []


def goals(files: list[Path]) -> list[str]:
    """A sentence for each goal, of the largest model that was timed."""
    found: dict[str, tuple[float, str]] = {}
    all_rows = [json.loads(path.read_text()) for path in files]
    for rows in sorted(all_rows, key=lambda rows: list(CASES).index(rows[0]["case"])):
        for each in timed(rows):
            what, length = _kind(each.row)
            if what in GOALS and each.ratio is not None:
                found[what] = each.ratio, f"{CASES[each.row['case']]}, {length}"
    return [
        f"Aimed at {goal:g}x for {what}: {found[what][0]:.2f}x ({found[what][1]}), "
        f"{'reached' if found[what][0] >= goal else 'not reached'}."
        for what, goal in GOALS.items()
        if what in found
    ]


# --- the two texts ----------------------------------------------------------------------------------------------------


def render(results: Path = RESULTS) -> str:
    """The block of docs/composition.md, markers included."""
    return "\n".join([BEGIN, *_checks(results), "", *_steps(results), END])


def _seconds_of_steps(files: list[Path]) -> list[str]:
    """One step of each model, in one sentence."""
    said = []
    for path in files:
        rows = json.loads(path.read_text())
        steps = {_kind(row)[0]: _seconds(row) for row in rows if not row["error"] and _kind(row)[1] == "one step"}
        if len(steps) > 1:
            times = ", ".join(f"{what} {seconds:.2f} s" for what, seconds in steps.items())
            case, kernel = rows[0]["case"], rows[0]["dense_attention"]
            said.append(f"One step of {CASES[case]}, 81 frames: {times} (dense on {kernel}; {rows[0]['device']}).")
    return said


def render_speed(results: Path = RESULTS) -> str:
    """The block of docs/speed.md, markers included."""
    said = [*_seconds_of_steps(step_files(results)), *goals(step_files(results))]
    more = "[Beside other things](composition.md#on-a-gpu) has the rows."
    text = [*said, more] if said else [f"SALAD with fp8 weights and with a cache was not timed yet. {more}"]
    return "\n".join([SPEED_BEGIN, *text, SPEED_END])


def main(results: Path = RESULTS) -> int:
    """Write both blocks."""
    for path, begin, end, block in (
        (PAGE, BEGIN, END, render(results)),
        (SPEED, SPEED_BEGIN, SPEED_END, render_speed(results)),
    ):
        text = path.read_text()
        path.write_text(text[: text.index(begin)] + block + text[text.index(end) + len(end) :])
    return 0


if __name__ == "__main__":
    sys.exit(main())
