"""`make help`, and the hooks of .pre-commit-config.yaml beside what `make lint` runs."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def hooks() -> list[dict[str, Any]]:
    yaml = pytest.importorskip("yaml", reason="comes with the extra docs")
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert repository["repo"] == "local"  # nothing is fetched
    return list(repository["hooks"])


def test_make_alone_lists_every_target() -> None:
    made = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert made.returncode == 0, made.stderr
    listed = re.findall(r"^  make (\S+) +\S", made.stdout, re.MULTILINE)
    (phony,) = re.findall(r"^\.PHONY: (.+)$", MAKEFILE, re.MULTILINE)
    assert sorted(listed) == sorted(phony.split())


def test_hooks_run_what_lint_runs() -> None:
    recipe = MAKEFILE.partition("\nlint:")[2].partition("\n\n")[0]
    linters = re.findall(r"^\t\$\(BIN\)/(.+)$", recipe, re.MULTILINE)
    assert [hook["entry"].removeprefix(".venv/bin/") for hook in hooks()] == linters
    assert all(hook["language"] == "system" for hook in hooks())
