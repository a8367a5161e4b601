"""A few cases of each command, and that damage which is not told would be seen."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.fuzz import files, kills, races
from tests.fuzz.subjects import Subject

CHEAP = ["salad", *(f"latents-{name}" for name in ("salad", "musubi", "finetrainers", "ltx")), "config", "index"]


def test_damaged_files() -> None:
    assert files.run(36, 11, CHEAP) == []


def test_faults_are_seen(tmp_path: Path) -> None:
    def system(folder: Path) -> str:
        return str(os.system("true"))

    def foreign(folder: Path) -> str:
        raise KeyError("missing")

    def large(folder: Path) -> str:
        return str(len(bytearray(2**29)))

    for read, said in ((system, "a command ran"), (foreign, "KeyError"), (large, "MemoryError")):
        assert files.attempt(Subject(lambda folder: None, read), tmp_path).startswith("FAULT: ")
        assert said in files.attempt(Subject(lambda folder: None, read), tmp_path)


def test_races() -> None:
    saves, loads, faults = races.run(2, 8, 4)
    assert faults == []
    assert min(saves, loads) > 10


@pytest.mark.parametrize("same_pid", [False, True])
def test_kills(same_pid: bool) -> None:
    if same_pid and os.geteuid() != 0:
        pytest.skip("a namespace of process numbers takes the rights of root")
    assert kills.run(2, 5, ["save", "export", "latents"], same_pid) == []
