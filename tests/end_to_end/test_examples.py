"""Every example runs as it stands, at its smallest size."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = {"quickstart.py": ["--tiny", "--device", "cpu"]}


def test_every_example_is_listed() -> None:
    # finetune.py needs data: tests/salad_compile/command_line/test_train.py runs it
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == {*EXAMPLES, "finetune.py"}


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str) -> None:
    command = [sys.executable, str(ROOT / "examples" / name), *EXAMPLES[name]]
    result = subprocess.run(command, capture_output=True, text=True, timeout=540)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    for part in ("speed-up of the whole forward", "blocks.{0..1}.attn1", "loss", "largest difference of the outputs"):
        assert part in result.stdout
