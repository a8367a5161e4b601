"""What compute-sanitizer printed becomes rows, and docs/kernels.md says what they say."""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path

import pytest

from tools import sanitize
from tools.sanitize import render, verdict

RACE = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at _forward+0x1a0 in file.py:3
=========     and Read access at _forward+0x200 in file.py:4 [16 hazards]
========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)
"""
LEAK = """========= Invalid __global__ read of size 2 bytes
=========     at _select+0x120 in kernel.py:9
========= ERROR SUMMARY: 3 errors
"""


def test_the_page_is_what_the_rows_say() -> None:
    assert render() in sanitize.PAGE.read_text(), "run: python -m tools.sanitize --page"


@pytest.mark.parametrize(("tool", "status", "printed", "outcome"), [
    ("memcheck", 0, "========= ERROR SUMMARY: 0 errors\n", "clean"),
    ("racecheck", 0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", "clean"),
    ("memcheck", 99, LEAK, "3 errors"),
    ("racecheck", 99, RACE, "1 errors, 1 warnings"),
    ("memcheck", 1, "========= ERROR SUMMARY: 0 errors\nTraceback", "no answer (exit status 1)"),
    ("racecheck", 255, "Device not supported", "no answer (exit status 255)"),
])  # fmt: skip
def test_what_it_printed_is_understood(tool: str, status: int, printed: str, outcome: str) -> None:
    assert verdict(tool, status, printed)["outcome"] == outcome


def test_kernels_are_named() -> None:
    assert verdict("racecheck", 99, RACE)["kernels"] == ["_forward"]
    assert verdict("memcheck", 99, LEAK)["kernels"] == ["_select"]


def test_a_run_that_hangs_fails_or_is_refused_is_no_clean_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With programs of ours in the place of the sanitizer."""
    monkeypatch.setattr(sanitize, "ROOT", tmp_path)
    folder = tmp_path / "tests" / "kernels" / "gpu"
    folder.mkdir(parents=True)
    for package in ("", "kernels", "kernels/gpu"):
        (tmp_path / "tests" / package / "__init__.py").touch()
    (folder / "small_calls.py").write_text("import sys; sys.exit(sys.argv[1] == 'broken')")
    program = tmp_path / "sanitizer"
    clean = "========= ERROR SUMMARY: 0 errors"
    program.write_text(
        f"#!{sys.executable}\nimport sys, time\n'hangs' in sys.argv and time.sleep(60)\nprint('{clean}')\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    outcome = {
        name: sanitize.check(name, ["memcheck"], seconds, str(program))[0]["outcome"]
        for name, seconds in (("fine", 30.0), ("broken", 30.0), ("hangs", 5.0))
    }
    assert outcome == {"fine": "clean", "broken": "failed (1)", "hangs": "stopped after 5 s"}


def test_rows_become_a_table(tmp_path: Path) -> None:
    assert "Not run yet" in render(tmp_path)
    about = {"device": "NVIDIA Imaginary", "torch": "2.11.0", "triton": "3.6.0", "commit": "0123456789abcdef"}
    rows = [
        {"call": "a", "tool": "memcheck", "outcome": "clean", **about},
        {"call": "a", "tool": "racecheck", "outcome": "2 errors", "kernels": ["_forward"], **about},
        {"call": "b", "tool": "none", "outcome": "failed (1)", **about},
    ]
    (tmp_path / "sanitizer_imaginary.json").write_text(json.dumps(rows))
    block = render(tmp_path)
    assert "| a | clean | 2 errors (`_forward`) |\n| b | failed (1) | failed (1) |" in block
    assert "NVIDIA Imaginary, torch 2.11.0, Triton 3.6.0, commit 0123456789ab." in block
