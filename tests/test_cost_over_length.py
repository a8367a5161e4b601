"""docs/kernels.md says what a token costs over the length as the rows do."""

from __future__ import annotations

import json
from pathlib import Path

from tests.end_to_end.scripts import run_script
from tools import cost_over_length
from tools.cost_over_length import ROOT, render


def test_the_page_is_what_the_rows_say() -> None:
    assert render() in cost_over_length.PAGE.read_text(), "run: python -m tools.cost_over_length"


def test_rows_of_the_benchmark_become_the_table(tmp_path: Path) -> None:
    assert "Not measured yet" in render(tmp_path)
    output = tmp_path / "length_cpu.json"
    run_script(
        ROOT / "benchmarks" / "length.py", "--quick", "--device", "cpu", "--output", str(output), said=tmp_path / "x"
    )
    rows = json.loads(output.read_text())
    assert [row["tokens"] for row in rows] == [8000, 8000, 16000, 16000]
    for row in rows:
        assert abs((1 - row["measured_sparsity"]) * row["tokens"] - 32 * 64) < 1, "as many blocks at each length"
    for row, nanoseconds in zip(rows, (20.0, 30.0, 22.0, 36.0), strict=True):
        least = {"block-sparse forward": 20.0, "operator forward": 30.0}[row["row"]]
        row |= {"ns_per_token": nanoseconds, "over_least": nanoseconds / least}
    output.write_text(json.dumps(rows))
    block = render(tmp_path)
    assert "| 8,000 | 20.0 | 30.0 |\n| 16,000 | 22.0 | 36.0 |" in block
    assert "block-sparse forward: the dearest token costs 10% more" in block
    assert "operator forward: the dearest token costs 20% more" in block
    assert "within 15%, not reached" in block
