"""No number in docs/what_to_pick.md's tables that is not in benchmarks/results/."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tools import what_to_pick
from tools.what_to_pick import ATTENTION, PAGE, RESULTS, STEPS


def test_the_page_is_what_the_rows_say() -> None:
    assert what_to_pick.render() in PAGE.read_text(), "run: python -m tools.what_to_pick"


def test_rows_of_a_gpu_become_its_cells(tmp_path: Path) -> None:
    for name in (*STEPS, ATTENTION, what_to_pick.PLACEMENTS):
        shutil.copy(RESULTS / name, tmp_path)
    rows = json.loads((RESULTS / STEPS[0]).read_text())
    for row in rows:
        row["device"], row["speedup"] = "NVIDIA Imaginary", 7.77
    (tmp_path / STEPS[0]).write_text(json.dumps(rows))
    block = what_to_pick.render(tmp_path)
    assert "| NVIDIA Imaginary | 14B-720p, 75,600 tokens | denoising step | 0.9 | 7.77x | FlashAttention-3 |" in block
    assert "cuDNN, the fastest of PyTorch's |" in block, "of the H100, where the FlashAttentions were not timed"
    rows[3]["error"] = "OutOfMemoryError"
    (tmp_path / STEPS[0]).write_text(json.dumps(rows))
    assert "Imaginary | 14B-720p" not in what_to_pick.render(tmp_path)
