"""Tables for people that also print as JSON and Markdown."""

from __future__ import annotations

import json
import re
import shutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from salad_compile.common.printable import printable
from salad_compile.common.table_layout import lay_out

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

WIDTH = 160

Row = tuple[str, ...]


class Report(ABC):
    """A titled table that also prints as JSON and Markdown; its `repr` is the table.

    Dataclasses that derive from it say `repr=False`: theirs would hide it.
    """

    title: str
    columns: Row

    @abstractmethod
    def rows(self) -> list[Row]:
        """Cells as text; rows that differ only in a number of the first cell are folded when shown."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Everything, unfolded, as JSON can hold it."""

    def notes(self) -> list[str]:
        """Lines below the table."""
        return []

    def to_json(self, *, indent: int | None = 2) -> str:
        """:meth:`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=indent)

    def to_markdown(self) -> str:
        """A Markdown table with its notes."""
        lines = [self.columns, tuple("---" for _ in self.columns), *fold(self.rows())]
        table = ["| " + " | ".join(_markdown(cell).replace("|", "\\|") for cell in line) + " |" for line in lines]
        return "\n".join([f"**{self.title}**", "", *table, "", "\n\n".join(map(_markdown, self.notes()))])

    def to_text(self, *, width: int | None = None) -> str:
        """The table as plain text; with None as wide as the terminal, or 160 columns where stdout is none."""
        from io import StringIO

        from rich.console import Console

        if width is None:
            width = shutil.get_terminal_size().columns if sys.stdout.isatty() else WIDTH
        buffer = StringIO()
        Console(file=buffer, width=width, color_system=None).print(self)
        return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich.text import Text

        rows = [tuple(map(printable, row)) for row in fold(self.rows())]
        yield from lay_out(self.title, self.columns, rows, options.max_width)
        yield from map(Text, map(printable, self.notes()))

    def __repr__(self) -> str:
        return self.to_text()

    def _repr_markdown_(self) -> str:  # what notebooks show
        return self.to_markdown()


def _markdown(text: str) -> str:
    """On one line, and with nothing in it that Markdown would swallow: "<locals>" is a tag, and "*" emphasis."""
    return " ".join(printable(text).split("\n")).replace("<", "&lt;").replace("*", "\\*")


def plural(count: int, noun: str) -> str:
    """`1 site`, `2 sites`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def fold(rows: Sequence[Row]) -> list[Row]:
    """Merge rows that are equal but for one consecutive number in the first cell: blocks.{0..39}.attn1."""
    groups: dict[tuple[str, Row], list[Row]] = {}
    for row in rows:
        groups.setdefault((re.sub(r"\d+", "#", row[0]), row[1:]), []).append(row)
    folded: list[Row] = []
    for (pattern, rest), members in groups.items():
        name = _fold_name(pattern, [[int(n) for n in re.findall(r"\d+", member[0])] for member in members])
        folded += [(name, *rest)] if name else members
    return folded


def _fold_name(pattern: str, numbers: list[list[int]]) -> str | None:
    """`pattern` with its numbers filled in, if just one of them varies and runs without a gap."""
    columns = list(zip(*numbers, strict=True))
    varying = [column for column in columns if len(set(column)) > 1]
    if len(varying) != 1 or list(varying[0]) != list(range(varying[0][0], varying[0][0] + len(numbers))):
        return None
    texts = [f"{{{c[0]}..{c[-1]}}}" if c is varying[0] else str(c[0]) for c in columns]
    for text in texts:
        pattern = pattern.replace("#", text, 1)
    return pattern


def site_path(component: str, name: str) -> str:
    return ".".join(part for part in (component, name) if part) or "(model)"
