"""The progress bar: on a terminal only, and without a thread."""

from __future__ import annotations

import io
import re
import sys
import threading

import pytest

from salad_compile.command_line.logging_setup import logs_on_stderr
from salad_compile.common.logs import logger
from salad_compile.common.progress import ProgressBar, quiet


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def drive(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch, **options: bool) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("salad_compile.common.progress.REFRESH_SECONDS", 0)
    threads = threading.active_count()
    with ProgressBar("items", 7, done=2, **options) as bar:
        bar.advance()
        bar.advance(2, note="loss 0.25")
        bar.advance()
        assert threading.active_count() == threads
    return stream.getvalue()


def test_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = drive(Terminal(), monkeypatch)
    for said in ("items", "3/7", "5/7", "6/7", "loss 0.25"):
        assert said in shown
    assert "7/7" not in shown


def test_elsewhere_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert drive(io.StringIO(), monkeypatch) == ""
    assert drive(Terminal(), monkeypatch, shown=False) == ""


def test_without_a_terminal_a_line_every_so_many_steps_or_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with ProgressBar("train", 10, done=2, every=3) as bar:
        for number in range(5):
            bar.advance(note=f"loss {number}")
    lines = stream.getvalue().splitlines()
    assert [line.rsplit(", ", 1)[0] for line in lines] == ["train: 3/10, loss 0", "train: 6/10, loss 3"]
    assert all(re.fullmatch(r"0:00:0\d left", line.rsplit(", ", 1)[1]) for line in lines)
    monkeypatch.setattr("salad_compile.common.progress.LINE_SECONDS", 0)
    with ProgressBar("items", 2) as bar:
        bar.advance(0, note="looking for them")
        bar.advance(note="")
    assert stream.getvalue().splitlines()[-2:] == ["items: 0/2, looking for them", "items: 1/2, 0:00:00 left"]
    before = stream.getvalue()
    with quiet(True), ProgressBar("items", 2, every=1) as bar:
        bar.advance()
    assert stream.getvalue() == before


def test_log_lines_stand_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    with logs_on_stderr(), ProgressBar("items", 3) as bar:
        bar.advance()
        logger.warning("look")
        bar.advance()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue()).replace("\r", "\n")
    assert "salad-compile: WARNING: look" in [line.strip() for line in shown.splitlines()]
