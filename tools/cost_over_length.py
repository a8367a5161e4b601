"""The table of docs/kernels.md that says what a token costs over the length, from the rows of `benchmarks/length.py`.

python -m tools.cost_over_length
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tools.support_table import table

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- length:begin -->", "<!-- length:end -->"
WITHIN = 0.15


def render(results: Path = RESULTS) -> str:
    """The block, markers included."""
    files = sorted(results.glob("length_*.json"))
    if not files:
        return "\n".join([BEGIN, "Not measured yet: `python benchmarks/length.py`.", END])
    rows: list[dict[str, Any]] = json.loads(files[-1].read_text())
    timed = [row for row in rows if not row["error"] and "ns_per_token" in row]
    names, first = list(dict.fromkeys(row["row"] for row in timed)), rows[0]
    lengths = sorted({row["tokens"] for row in timed})
    cell = {(row["row"], row["tokens"]): f"{row['ns_per_token']:.1f}" for row in timed}
    shown = [(f"{tokens:,}", *(cell.get((name, tokens), "-") for name in names)) for tokens in lengths]
    said = []
    for name in names:
        spread = max(row["over_least"] for row in timed if row["row"] == name) - 1
        said.append(f"{name}: the dearest token costs {spread:.0%} more than the cheapest")
    worst = max(row["over_least"] for row in timed) - 1
    return "\n".join([
        BEGIN,
        f"`python benchmarks/length.py`: {first['device']}, torch {first['torch']}, commit {first['commit'][:12]}; "
        f"{first['heads']} heads of {first['head_dim']}, {first['kept_blocks']} key blocks kept at each length, all "
        "lengths timed in turn.",
        "",
        table(("tokens", *(f"{name}, ns a token" for name in names)), shown),
        "",
        f"{'; '.join(said)}. Aimed at: within {WITHIN:.0%}, {'reached' if worst <= WITHIN else 'not reached'}.",
        END,
    ])  # fmt: skip


def main() -> int:
    """Write the block."""
    text = PAGE.read_text()
    PAGE.write_text(text[: text.index(BEGIN)] + render() + text[text.index(END) + len(END) :])
    return 0


if __name__ == "__main__":
    sys.exit(main())
