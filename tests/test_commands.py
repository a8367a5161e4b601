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


def recipe(target: str) -> str:
    """The lines of a target of the Makefile."""
    return MAKEFILE.partition(f"\n{target}:")[2].partition("\n\n")[0]


def test_make_alone_lists_every_target() -> None:
    made = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert made.returncode == 0, made.stderr
    listed = re.findall(r"^  make (\S+) +\S", made.stdout, re.MULTILINE)
    phony = {name for line in re.findall(r"^\.PHONY: (.+)$", MAKEFILE, re.MULTILINE) for name in line.split()}
    parts = set(re.findall(r"\b(lint-\w+)", recipe("lint")))
    assert parts < phony
    assert sorted(listed) == sorted(phony - parts)


def test_hooks_run_what_lint_runs() -> None:
    parts = re.findall(r"\b(lint-\w+)", recipe("lint"))
    lines = "\n".join(map(recipe, parts))
    linters = re.findall(r"^\t\$\(BIN\)/(.+)$", lines, re.MULTILINE)
    assert len(parts) == 2
    assert sorted(hook["entry"].removeprefix(".venv/bin/") for hook in hooks()) == sorted(linters)
    assert all(hook["language"] == "system" for hook in hooks())
