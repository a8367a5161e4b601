from __future__ import annotations

from pathlib import Path

import pytest

from salad_compile.analysis import pictures
from salad_compile.command_line import WRONG
from salad_compile.errors import MissingPackageError
from tests.salad_compile.command_line.conftest import SIZE, Run


def test_pictures_of_a_file(command: Run, wan: Path, salad_file: Path, tmp_path: Path) -> None:
    words = ("viz", wan, *SIZE, "--dtype", "float32", "--salad", salad_file, "--device", "cpu")
    outcome = command(*words, "--output", tmp_path / "pictures", "--json")
    assert outcome.code == 0, outcome.err
    found = outcome.json()
    assert Path(found["page"]) == tmp_path / "pictures" / "index.html"
    assert found["pictures"] == ["gate.png", "masks_blocks.0.attn1.png", "masks_blocks.1.attn1.png", "recall.png"]
    assert all((tmp_path / "pictures" / name).stat().st_size > 1000 for name in found["pictures"])


def test_without_matplotlib(
    command: Run, wan: Path, salad_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise MissingPackageError("pip install 'salad-compile[pictures]'")

    monkeypatch.setattr(pictures, "_require_matplotlib", missing)
    words = ("viz", wan, *SIZE, "--salad", salad_file, "--device", "cpu", "--output", tmp_path / "pictures")
    outcome = command(*words)
    assert (outcome.code, outcome.err.strip()) == (
        WRONG,
        "salad-compile: error: pip install 'salad-compile[pictures]'",
    )
