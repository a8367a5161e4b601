"""docs/inference.md says what several GPUs give as the rows do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tools import scaling
from tools.scaling import render


def row(step: str, kind: str, degree: int, ms: float, **facts: Any) -> dict[str, Any]:
    about = {"device": "NVIDIA Imaginary", "torch": "2.11.0", "commit": "0123456789abcdef", "sparsity": 0.9}
    shape = {"case": "1.3B-480p", "tokens": 32_760, "heads": 12, "layers": 30, "row": kind.upper(), "error": None}
    measured = {"median_ms": ms, "exchange_share": 0.08, "peak_bytes": 2**32}
    return about | shape | measured | {"pass": step, "kind": kind, "degree": degree} | facts


def test_the_page_is_what_the_rows_say() -> None:
    assert render() in scaling.PAGE.read_text(), "run: python -m tools.scaling"


def test_rows_become_two_tables_with_their_reasons(tmp_path: Path) -> None:
    assert "not measured yet" in render(tmp_path)
    step, training = "denoising step", "training step"
    rows = [
        row(step, "salad", 1, 200.0),
        row(step, "dense", 1, 500.0, dense_attention="cuDNN"),
        row(step, "salad", 2, 125.0),
        row(step, "dense", 2, 0.0, median_ms=None, error="process 1 ended with 1: no memory"),
        row(training, "ddp", 1, 800.0),
        row(training, "ddp", 2, 1000.0),
    ]
    (tmp_path / "scale_x.json").write_text(json.dumps(rows))
    lines = [" ".join(line.split()) for line in render(tmp_path).splitlines()]
    assert "| 1.3B-480p, 32,760 tokens | 1 | 500, cuDNN | | - | 200 | | - | 2.50x | 4.0, 4.0 |" in lines
    assert "| 1.3B-480p, 32,760 tokens | 2 | - | - | - | 125 | 80% | 8.0% | - | -, 4.0 |" in lines
    assert "| 1.3B-480p, DDP | 2 | 1,000 | 80% | 8.0% | 4.0 |" in lines
    assert "- 1.3B-480p, DENSE on 2: process 1 ended with 1: no memory" in lines
