"""The README's "Measured" block, written from the raw rows in benchmarks/results/ and from nothing else.

python tools/measured.py            rewrite the block
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
README, RESULTS = ROOT / "README.md", ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- measured:begin -->", "<!-- measured:end -->"


def render() -> str:
    """The block's text, markers included."""
    return "\n".join([BEGIN, *_operators(), "", *_demo(), END])


def _operators() -> list[str]:
    rows: list[dict[str, Any]] = json.loads((RESULTS / "attention_cpu.json").read_text())
    first = rows[0]
    lines = [
        f"Operators, `{first['command']}`: {first['cpu']}, {first['threads']} threads,",
        f"torch {first['torch']}; {first['tokens']:,} tokens, {first['heads']} heads of {first['head_dim']}, "
        f"blocks of {first['block']}, measured sparsity {first['measured_sparsity']:.3f}.",
        "Medians, in brackets the middle 80 %; every round times every row in turn. A bf16 ratio also measures that",
        "PyTorch's dense bf16 attention leaves the bf16 units unused: the row of plain bf16 matrix products does not.",
        "",
        "| row | milliseconds | dense / row |",
        "| --- | --- | --- |",
    ]
    for row in rows:
        spread = f"{row['median_ms']:,.0f} ({row['p10_ms']:,.0f} to {row['p90_ms']:,.0f})"
        lines.append(f"| {row['row']} | {spread} | {row['speedup']:.1f}x |")
    return lines


def _demo() -> list[str]:
    row: dict[str, Any] = json.loads((RESULTS / "quickstart_cpu.json").read_text())
    dense, salad = (f"{statistics.median(row[name]):.2f} s" for name in ("dense", "salad"))
    spreads = [f"{min(row[name]):.2f} to {max(row[name]):.2f}" for name in ("dense", "salad")]
    return [
        "Whole forward of a Wan-class model with two blocks,",
        f"`{row['command']}`:",
        f"{row['tokens']:,} tokens, {row['threads']} threads, torch {row['versions']['torch']}, 90 % sparsity, LoRA "
        f"unmerged. Dense under torch.compile: {dense} ({spreads[0]});",
        f"SALAD: {salad} ({spreads[1]}); **{row['speed_up']:.2f}x** (medians of {len(row['dense'])}, timed in turn).",
    ]


def main() -> None:
    """Rewrite the block of the README."""
    text = README.read_text()
    start, end = text.index(BEGIN), text.index(END) + len(END)
    README.write_text(text[:start] + render() + text[end:])


if __name__ == "__main__":
    main()
