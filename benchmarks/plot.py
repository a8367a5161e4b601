"""Pictures of the kernel rows: speed-up over length and over sparsity, and rates beside the measured ceiling.

    python benchmarks/plot.py                                       every attention_<GPU>.json in benchmarks/results/
    python benchmarks/plot.py rows.json --folder pictures           one file

It draws only what is in the rows. Only this script needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes

RESULTS = Path(__file__).resolve().parent / "results"
SERIES = {
    "block-sparse forward": "block-sparse kernel",
    "operator forward": "operator (routing, sparse, linear)",
    "operator + Proj forward": "operator + Proj",
}
MAIN = "1.3B-480p"
COLOURS = {"dense": "0.6", "salad": "tab:blue", "rival": "tab:orange"}
Rows = list[dict[str, Any]]


def timed(rows: Iterable[dict[str, Any]]) -> Rows:
    """The rows that have a result."""
    return [row for row in rows if "median_ms" in row and not row["error"]]


def draw_lines(axes: Axes, rows: Rows, x: Callable[[dict[str, Any]], float]) -> None:
    """One line per series; the bars are the row's own middle 80 % against the dense median."""
    for name, label in SERIES.items():
        points = sorted((row for row in rows if row["row"] == name and "speedup" in row), key=x)
        if not points:
            continue
        ratios = [row["speedup"] for row in points]
        below = [row["speedup"] * (1 - row["median_ms"] / row["p90_ms"]) for row in points]
        above = [row["speedup"] * (row["median_ms"] / row["p10_ms"] - 1) for row in points]
        axes.errorbar([x(row) for row in points], ratios, yerr=(below, above), marker="o", capsize=3, label=label)
    axes.axhline(1, color="0.6", linewidth=1)
    axes.set_ylabel("best dense kernel / row")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()


def speedup_over_length(axes: Axes, rows: Rows) -> bool:
    """Speed-up against the number of tokens; False if no such rows are there."""
    chosen = [row for row in timed(rows) if row["case"].startswith("length-")]
    if not chosen:
        return False
    draw_lines(axes, chosen, lambda row: float(row["tokens"]))
    axes.set_xscale("log", base=2)
    lengths = sorted({row["tokens"] for row in chosen})
    axes.set_xticks(lengths, [f"{n / 1024:.3g}k" for n in lengths], rotation=45)
    axes.set_xlabel(f"tokens ({chosen[0]['heads']} heads of {chosen[0]['head_dim']}, {_sparsity(chosen)} sparsity)")
    return True


def _sparsity(rows: Rows) -> str:
    return f"{max(row.get('sparsity') or 0 for row in rows):.0%}"


def speedup_over_sparsity(axes: Axes, rows: Rows) -> bool:
    """Speed-up against the measured sparsity; False if no such rows are there."""
    chosen = [row for row in timed(rows) if row["case"] == "sparsity" and row["kind"] == "salad"]
    if not chosen:
        return False
    draw_lines(axes, chosen, lambda row: float(row["measured_sparsity"]))
    first = chosen[0]
    axes.set_xlabel(f"measured sparsity ({first['tokens']:,} tokens, {first['heads']} heads of {first['head_dim']})")
    return True


def rates(axes: Axes, rows: Rows) -> bool:
    """TFLOP/s over computed pairs, with the matrix product of the same run; False if no such rows are there."""
    chosen = [row for row in timed(rows) if row["case"] == MAIN and "tflops" in row and row["kind"] in COLOURS]
    if not chosen:
        return False
    chosen.reverse()  # bars are drawn from the bottom
    names = [_bar_name(row) for row in chosen]
    axes.barh(names, [row["tflops"] for row in chosen], color=[COLOURS[row["kind"]] for row in chosen])
    for peak in [row for row in timed(rows) if row["case"] == MAIN and row["row"].startswith("matmul")]:
        axes.axvline(peak["tflops"], color="tab:red", label=f"{peak['row']} {peak['dtype']}, same run")
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1.06))
    axes.set_xlabel("TFLOP/s over the token pairs that are computed")
    return True


def _bar_name(row: dict[str, Any]) -> str:
    name = row["row"] if row["pass"] in row["row"] else f"{row['row']} {row['pass']}"
    blocks = " 64x64" if row.get("query_block") == 64 else ""
    return f"{name}{blocks}" + (f" ({row['sparsity']:.0%})" if row["kind"] != "dense" else "")


PICTURES: dict[str, Callable[[Axes, Rows], bool]] = {
    "length": speedup_over_length,
    "sparsity": speedup_over_sparsity,
    "tflops": rates,
}


def draw(path: Path, folder: Path) -> list[Path]:
    """All pictures that the rows of a file allow."""
    rows: Rows = json.loads(path.read_text())
    written = []
    for name, picture in PICTURES.items():
        figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
        if picture(axes, rows):
            axes.set_title(f"{rows[0]['device']}, torch {rows[0]['torch']}, {rows[0].get('date', '')}", fontsize=9)
            folder.mkdir(parents=True, exist_ok=True)
            written.append(folder / f"{path.stem}_{name}.png")
            figure.savefig(written[-1], dpi=110)
        pyplot.close(figure)
    return written


def main() -> None:
    """Draw the given files, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="rows of benchmarks/attention.py")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the pictures go (default: %(default)s)")
    options = parser.parse_args()
    found = [path for path in sorted(RESULTS.glob("attention_*.json")) if path.name != "attention_cpu.json"]
    for path in options.files or found:
        for picture in draw(path, options.folder):
            print(picture)


if __name__ == "__main__":
    main()
