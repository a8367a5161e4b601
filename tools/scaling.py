"""The table of docs/inference.md that says what several GPUs give, from the rows of `benchmarks/scale.py`.

python -m tools.scaling
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tools.support_table import table

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "inference.md"
BEGIN, END = "<!-- scaling:begin -->", "<!-- scaling:end -->"
STEP, TRAINING = "denoising step", "training step"
Row = dict[str, Any]


def render(results: Path = RESULTS) -> str:
    """The block, markers included."""
    files = sorted(results.glob("scale_*.json"))
    if not files:
        return "\n".join([BEGIN, "What it takes in time is not measured yet: `python benchmarks/scale.py`.", END])
    rows: list[Row] = json.loads(files[-1].read_text())
    timed = {_place(row): row for row in rows if not row["error"] and row.get("median_ms")}
    first, parts = rows[0], []
    steps = [row for row in timed.values() if row["pass"] == STEP]
    if steps:
        alike = {(row["case"], row["degree"]): row for row in sorted(steps, key=_order)}
        parts += ["", table(_HEADS, [_step(row, timed) for row in alike.values()])]
    trained = [row for row in timed.values() if row["pass"] == TRAINING]
    if trained:
        parts += ["", table(_TRAINING_HEADS, [_training(row, timed) for row in sorted(trained, key=_order)])]
    failed = [row for row in rows if row["error"]]
    reasons = [f"- {row['case']}, {row['row']} on {row['degree']}: {row['error'][:160]}" for row in failed]
    sparsity = max(row["sparsity"] for row in rows)
    return "\n".join([
        BEGIN,
        f"`python benchmarks/scale.py`: {first['device']}, torch {first['torch']}, commit {first['commit'][:12]}; "
        f"bf16, {sparsity:.0%} sparsity, random weights of the real sizes. Efficiency is over one GPU of the "
        "same run; exchange is the share of a step in NCCL's kernels; dense is diffusers' exchange around the kernel "
        "that is named. Rows: `benchmarks/results/" + files[-1].name + "`.",
        *parts,
        *(["", "Without a timing:", "", *reasons] if reasons else []),
        END,
    ])  # fmt: skip


_HEADS = ("denoising step", "GPUs", "dense, ms", "efficiency", "exchange", "SALAD, ms", "efficiency", "exchange",
          "dense / SALAD", "GiB on a GPU, dense and SALAD")  # fmt: skip
_TRAINING_HEADS = ("training step, a video for each GPU", "GPUs", "ms", "efficiency", "exchange", "GiB on a GPU")


def _place(row: Row) -> tuple[str, str, str, int]:
    return row["case"], row["pass"], row["kind"], row["degree"]


def _order(row: Row) -> tuple[int, str, int, str]:
    return row["tokens"] * row["heads"] * row["layers"], row["case"], row["degree"], row["kind"]


def _step(row: Row, timed: dict[tuple[str, str, str, int], Row]) -> tuple[str, ...]:
    dense, salad = (timed.get((row["case"], STEP, kind, row["degree"])) for kind in ("dense", "salad"))
    ratio = f"{dense['median_ms'] / salad['median_ms']:.2f}x" if dense and salad else "-"
    cells = [text for found in (dense, salad) for text in _cells(found, timed)]
    return (
        f"{row['case']}, {row['tokens']:,} tokens",
        str(row["degree"]),
        *cells,
        ratio,
        f"{_memory(dense)}, {_memory(salad)}",
    )


def _training(row: Row, timed: dict[tuple[str, str, str, int], Row]) -> tuple[str, ...]:
    return f"{row['case']}, {row['row']}", str(row["degree"]), *_cells(row, timed), _memory(row)


def _cells(row: Row | None, timed: dict[tuple[str, str, str, int], Row]) -> tuple[str, str, str]:
    """Milliseconds, efficiency, share of exchange."""
    if row is None:
        return "-", "-", "-"
    kernel = f", {row['dense_attention']}" if row.get("dense_attention") else ""
    one = timed.get((row["case"], row["pass"], row["kind"], 1))
    work = row["degree"] if row["pass"] == STEP else 1
    efficiency = f"{one['median_ms'] / (work * row['median_ms']):.0%}" if one else "-"
    exchange = f"{row['exchange_share']:.1%}" if row["degree"] > 1 and row.get("exchange_share") is not None else "-"
    return f"{row['median_ms']:,.0f}{kernel}", efficiency if row["degree"] > 1 else "", exchange


def _memory(row: Row | None) -> str:
    return f"{row['peak_bytes'] / 2**30:.1f}" if row and row.get("peak_bytes") else "-"


def main() -> int:
    """Write the block."""
    text = PAGE.read_text()
    PAGE.write_text(text[: text.index(BEGIN)] + render() + text[text.index(END) + len(END) :])
    return 0


if __name__ == "__main__":
    sys.exit(main())
