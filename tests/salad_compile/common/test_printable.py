"""What others wrote steers no terminal: not in tables, not in messages, not in bars."""

from __future__ import annotations

import io
import logging
import sys
from typing import Any

import pytest

from salad_compile.command_line.logging_setup import logs_on_stderr
from salad_compile.common.logs import logger
from salad_compile.common.printable import printable
from salad_compile.common.progress import ProgressBar
from salad_compile.common.reports import Report, Row

HOSTILE = "a\x1b]0;title\x07\x1b[2J\r\x9b\u202eb\ud800[/red]"
SHOWN = r"a\x1b]0;title\x07\x1b[2J\r\x9b\u202eb\ud800[/red]"


class Hostile(Report):
    title = "hostile"
    columns = ("name",)

    def rows(self) -> list[Row]:
        return [(HOSTILE,)]

    def notes(self) -> list[str]:
        return [HOSTILE]

    def to_dict(self) -> dict[str, Any]:
        return {}


def test_control_signs_are_written_out_and_texts_stay() -> None:
    assert printable(HOSTILE) == SHOWN
    kept = "zwei\nZeilen\tund 猫 \U0001f469\u200d\U0001f680 \u0645\u06cc\u200c\u062e\u00a0!"
    assert printable(kept) == kept


def test_in_tables() -> None:
    assert Hostile().to_text().count(SHOWN) == 2
    assert Hostile().to_markdown().count(SHOWN) == 2


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("terminal", [True, False])
def test_in_bars_and_logs(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("COLUMNS", "400")
    # pytest keeps what reaches the root logger, and pytest-xdist cannot send half of a surrogate pair on
    monkeypatch.setattr(logger, "propagate", False)
    with ProgressBar(HOSTILE, 2, every=1) as bar:
        bar.advance(note=HOSTILE)
        bar.say(HOSTILE)
    with logs_on_stderr():
        logger.log(logging.WARNING, "skipped: %s", HOSTILE)
    said = stream.getvalue()
    assert said.count(SHOWN) >= 4
    assert not any(sign in said for sign in ("\x07", "\x1b]0", "\u202e", "\ud800"))
