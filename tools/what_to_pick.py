"""The tables of docs/what_to_pick.md: gains by GPU, model, length and sparsity, from the rows in benchmarks/results/.

python -m tools.what_to_pick            rewrite the page's block
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tools.support_table import table

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "what_to_pick.md"
BEGIN, END = "<!-- pick:begin -->", "<!-- pick:end -->"
STEPS = ("transformer_h200.json", "transformer_h100.json")  # whole steps, one file for each GPU
ATTENTION = "attention_h200.json"  # one layer's attention, lengths and sparsities
PLACEMENTS = "variants_h200.json"
OPERATOR = "operator + Proj forward"
Row = dict[str, Any]


def _rows(results: Path, name: str) -> list[Row]:
    rows: list[Row] = json.loads((results / name).read_text())
    return [row for row in rows if not row["error"] and "median_ms" in row]


def render(results: Path = RESULTS) -> str:
    """The block, markers included."""
    attention = _rows(results, ATTENTION)
    parts = [
        "**By GPU and model**, whole steps at the sparsity beside them, without compensation (2 % of a step):",
        _by_model(results),
        "**By length**, attention of one layer with its projection, 12 heads, sparsity 0.9, against the fastest dense "
        f"attention of PyTorch, one {attention[0]['device']}:",
        _by(attention, "length-", "tokens", lambda row: f"{row['tokens']:,}", extra="1.3B-480p"),
        "**By sparsity**, the same at 32,760 tokens:",
        _by(attention, "sparsity", "sparsity", lambda row: f"{row['sparsity']:g}"),
        "**By placement**, a denoising step of Wan2.1 1.3B at 480p:",
        _by_placement(results),
        f"Rows: {', '.join(f'`benchmarks/results/{name}`' for name in (*STEPS, ATTENTION, PLACEMENTS))}.",
    ]
    return "\n\n".join([BEGIN, *parts, END])


def _by_model(results: Path) -> str:
    cells = []
    for name in STEPS:
        for row in _rows(results, name):
            if row["kind"] == "salad" and row.get("compensation") in (None, "", "none"):
                dense = row.get("dense_attention") or _best_timed(row)
                made = f"{row['speedup']:.2f}x"
                size = f"{row['case']}, {row['tokens']:,} tokens"
                cells.append((row["device"], size, row["pass"], f"{row['sparsity']:g}", made, dense))
    return table(("GPU", "model", "step", "sparsity", "faster than dense", "dense attention"), cells)


def _best_timed(row: Row) -> str:
    """Of older rows: the fastest of the kernels that were there, by the times in the row."""
    times: dict[str, float] = row["dense_attention_ms"]
    return f"{min(times, key=lambda name: times[name])}, the fastest of PyTorch's"


def _by(rows: list[Row], case: str, heading: str, shown: Any, extra: str = "") -> str:
    chosen = [
        row
        for row in rows
        if row["row"] == OPERATOR and (row["case"].startswith(case) or row["case"] == extra) and row.get("speedup")
    ]
    chosen.sort(key=lambda row: (row["tokens"], row["sparsity"]))
    return table((heading, "faster than dense"), [(shown(row), f"{row['speedup']:.1f}x") for row in chosen])


def _by_placement(results: Path) -> str:
    """The rows of one run, the first of the file, of either placement."""
    found: dict[str, Row] = {}
    for row in _rows(results, PLACEMENTS):
        if (row["kind"], row["case"], row["pass"], row.get("pattern")) == (
            "salad",
            "1.3B-480p",
            "denoising step",
            "topk",
        ) and row.get("gate") == "token":
            found.setdefault(row["rope_placement"], row)
    names = [name for name in ("map-then-rotate", "rotate-then-map") if name in found]
    cells = [(f"`{name}`", f"{found[name]['median_ms']:.0f} ms", f"{found[name]['speedup']:.2f}x") for name in names]
    return table(("placement", "SALAD", "faster than cuDNN's dense"), cells)


def main() -> None:
    """Rewrite the block."""
    text = PAGE.read_text()
    PAGE.write_text(text[: text.index(BEGIN)] + render() + text[text.index(END) + len(END) :])


if __name__ == "__main__":
    main()
