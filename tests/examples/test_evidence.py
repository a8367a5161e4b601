"""No number in docs/evidence.md that is not in benchmarks/results/; tables from whatever rows there are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

Load = Callable[[str], ModuleType]


@pytest.fixture(scope="module")
def evidence(load: Load) -> ModuleType:
    return load("evidence")


def row_of(arm: str, seed: int, loss: float, rate: float) -> dict[str, Any]:
    tune = {"rate": rate, "clips": 2_000, "batch": 32, "steps": 400}
    settings = {"tune": tune, "rank": 16, "trained": arm not in ("dense", "sparse-only")}
    machine = {"device": "NVIDIA Imaginary", "torch": "2.11", "triton": "3.6", "commit": "abc", "date": "2026-11-26"}
    measured = {"held_out_loss": loss, "held_out_by_level": [loss] * 5, "psnr": 20.0, "ssim": 0.5}
    return {"arm": arm, "seed": seed, "settings": settings, **measured, **machine}


def fake_rows(load: Load) -> list[dict[str, Any]]:
    rate = load("presets").FULL.tune.rate
    rows = [row_of("dense", 0, 0.1, rate), row_of("dense-tuned", 0, 0.09, rate), row_of("sparse-only", 0, 0.2, rate)]
    rows += [row_of("salad", seed, loss, rate) for seed, loss in enumerate((0.11, 0.12))]
    return [*rows, row_of("sparse-lora", 0, 0.13, rate), row_of("salad", 0, 0.19, rate / 2)]


def test_the_page_is_what_the_rows_say(evidence: ModuleType) -> None:
    written = evidence.PAGE.read_text()
    assert evidence.render(evidence.newest_rows()) in written


def test_tables_from_fake_rows(evidence: ModuleType, load: Load, tmp_path: Path) -> None:
    page, file = tmp_path / "page.md", tmp_path / "rows.jsonl"
    page.write_text(f"before\n{evidence.BEGIN}\nold\n{evidence.END}\nafter\n")
    file.write_text("".join(json.dumps(row) + "\n" for row in fake_rows(load)) + '{"cut')
    evidence.write(page, load("results").read(file))
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    line = next(line for line in text.splitlines() if line.startswith("| `salad` | SALAD"))
    # (0.2 - 0.115) / (0.2 - 0.1), and the same with 0.09
    assert "| 2 | 0.11500 ± 0.00500 | 1.150 | 85.0% | 77.3% |" in line
    assert "80% is reached" in text
    assert "more than the spread" in text
    assert "| `salad` | 0.19000 | 0.11000 |" in text  # the sweep
    assert "Not run: " in text
    assert "NVIDIA Imaginary" in text
    assert text.index("80% is reached") < text.index("<details"), "what matters most is not folded"
    assert text.count("<details") == text.count("</details>") > 2
    assert '<details markdown="1"><summary>Learning rate, held-out loss of seed 0</summary>\n\n| arm |' in text


def test_rows_that_cannot_be_compared_are_an_error(evidence: ModuleType, load: Load, tmp_path: Path) -> None:
    rows = [row for row in fake_rows(load) if row["arm"] != "dense-tuned"]
    with pytest.raises(evidence.MissingRowsError, match="dense-tuned"):
        evidence.render(rows)
    page = tmp_path / "page.md"
    page.write_text("nothing")
    with pytest.raises(ValueError, match="markers"):
        evidence.write(page, fake_rows(load))


def test_rows_survive_a_kill_and_many_writers(load: Load, tmp_path: Path) -> None:
    results, file = load("results"), tmp_path / "rows.jsonl"
    for seed in (0, 1, 0):
        results.append(file, row_of("salad", seed, 0.1 + seed, 0.5))
    file.write_text(file.read_text() + '{"arm": "sal')
    assert [row["seed"] for row in results.read(file)] == [0, 1]
    file.write_text("{\n" + json.dumps(row_of("salad", 0, 0.1, 0.5)) + "\n")
    with pytest.raises(ValueError, match="line 1"):
        results.read(file)
    assert results.read(tmp_path / "absent.jsonl") == []
