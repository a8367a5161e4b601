"""Every example runs as it stands, at its smallest size."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.end_to_end.scripts import run_script

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = {"quickstart.py": ["--tiny", "--device", "cpu"]}


def test_every_example_is_listed() -> None:
    # finetune.py needs data: tests/salad_compile/command_line/test_train.py runs it
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == {*EXAMPLES, "finetune.py"}


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str, tmp_path: Path) -> None:
    said = run_script(ROOT / "examples" / name, *EXAMPLES[name], said=tmp_path / "said")
    for part in ("speed-up of the whole forward", "blocks.{0..1}.attn1", "loss", "largest difference of the outputs"):
        assert part in said
