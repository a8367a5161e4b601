"""Reports in the interpreter, in notebooks and on terminals of any width."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from rich.console import Console

from salad_compile.analysis import calibration, diagnosis, dropping, summary  # noqa: F401  (subclasses of Report)
from salad_compile.command_line import checkup, file_report, timing, whole_video  # noqa: F401
from salad_compile.common.reports import Report, Row
from salad_compile.discovery import plan  # noqa: F401
from salad_compile.exchange import export_report  # noqa: F401


@dataclass(frozen=True, repr=False)
class Sample(Report):
    """Ten columns, one of them empty, one of them prose."""

    title = "a table"
    columns = ("site", "heads x dim", "mask", *(f"cosine {i}" for i in range(6)), "reason")

    def rows(self) -> list[Row]:
        reason = "a x[dim] of [bold] and :smile: is no style, and this sentence is too long for one line"
        return [
            (f"transformer_blocks.{i}.{name}", "12 x 128", "", *(f"0.{i}{j}" for j in range(6)), why)
            for i, name, why in ((4, "attn", reason), (9, "attn2", ""))
        ]

    def notes(self) -> list[str]:
        return ["axes [T, H, W] of [latents]"]

    def to_dict(self) -> dict[str, Any]:
        return {}


def subclasses(cls: type) -> Iterator[type]:
    for each in cls.__subclasses__():
        yield each
        yield from subclasses(each)


def test_every_report_shows_its_table() -> None:
    hidden = [cls.__name__ for cls in subclasses(Report) if cls.__repr__ is not Report.__repr__]
    assert hidden == []
    assert len(list(subclasses(Report))) >= 10
    report = Sample()
    assert repr(report) == str(report) == report.to_text(width=160)
    assert report._repr_markdown_() == report.to_markdown()
    assert report.to_markdown().startswith("**a table**\n\n| site | heads x dim |")


@pytest.mark.parametrize("width", [50, 80, 120, 220])
def test_tables_fit_the_width_and_lose_nothing(width: int) -> None:
    text = Sample().to_text(width=width)
    assert max(map(len, text.splitlines())) <= width
    words = re.sub(r"[\s─]+", " ", text).split()
    for row in [*Sample().rows(), Sample().notes()]:
        for cell in row:
            assert len(cell) > 20 or cell in re.sub(r"\s+", " ", text), cell
            for word in cell.split():
                assert word in words, word
    parts = text.count("heads") and sum(line.lstrip().startswith("site") for line in text.splitlines())
    assert (parts > 1) == (width < 120)
    assert ("mask" in text) == (width == 220)  # the empty column goes first


def test_markdown_swallows_nothing() -> None:
    class Odd(Sample):
        def rows(self) -> list[Row]:
            return [("a.<locals>.b", "*args | **kwargs", "two\nlines", *[""] * 7)]

        def notes(self) -> list[str]:
            return ["first", "second of <lambda>"]

    lines = Odd().to_markdown().splitlines()
    assert lines[4].startswith("| a.&lt;locals>.b | \\*args \\| \\*\\*kwargs | two lines | ")
    assert lines[5:] == ["", "first", "", "second of &lt;lambda>"]


def test_a_terminal_says_how_wide_the_table_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "70")
    assert repr(Sample()) == Sample().to_text(width=70)
    console = Console(width=70, color_system=None)
    with console.capture() as captured:
        console.print(Sample())
    assert [line.rstrip() for line in captured.get().splitlines()] == repr(Sample()).splitlines()
