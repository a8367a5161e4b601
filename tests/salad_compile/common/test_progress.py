"""The progress bar: on a terminal only, and without a thread."""

from __future__ import annotations

import io
import sys
import threading

import pytest

from salad_compile.common.progress import ProgressBar


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
