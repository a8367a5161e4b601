"""How a table fits a terminal: headings and prose are broken at words, and what is still too wide goes on below."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

WIDE, TIGHT = 3, 2  # between two columns: the divider of the box, a space, and one more where there is room
EDGES = 2  # of the box
UNBROKEN = 20  # a longer cell is prose, broken at its spaces; names and numbers stay in one piece
PROSE = 16  # the least width of prose


def lay_out(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[Table]:
    """The table, or the parts of it that fit `width` one below the other, each with the first column again.

    Where not all columns fit, those without any content are left out.
    """
    cells = [[column, *(row[i] for row in rows)] for i, column in enumerate(columns)]
    natural = [max(map(len, column)) for column in cells]
    if sum(natural) + WIDE * (len(columns) - 1) + EDGES <= width:
        return [_table(title, cells, natural, WIDE)]
    cells = [column for i, column in enumerate(cells) if i == 0 or any(column[1:])]
    least = [min(_least(column), width - EDGES) for column in cells]
    least[0] = min(least[0], max(width // 2, width - EDGES - TIGHT - max(least[1:], default=0)))
    tables: list[Table] = []
    for part in _divide(least, width - EDGES):
        shown = [cells[i] for i in part]
        widths = _widen([max(map(len, column)) for column in shown], [least[i] for i in part], width - EDGES)
        tables.append(_table("" if tables else title, shown, widths, TIGHT))
    return tables


def _least(column: Sequence[str]) -> int:
    """The least width of a column, heading first: no word is broken, and no cell that is not prose."""
    heading, *cells = column
    prose = [cell for cell in cells if len(cell) > UNBROKEN and " " in cell]
    words = [len(word) for cell in prose for word in cell.split()]
    whole = [len(cell) for cell in cells if cell not in prose]
    return max(*map(len, heading.split()), *words, *whole, PROSE if prose else 1)


def _divide(least: Sequence[int], width: int) -> list[list[int]]:
    """The columns of each part, as many as have room; the first is in all of them."""
    parts, used = [[0]], least[0]
    for i in range(1, len(least)):
        if used + TIGHT + least[i] > width and len(parts[-1]) > 1:
            parts.append([0])
            used = least[0]
        parts[-1].append(i)
        used += TIGHT + least[i]
    return parts


def _widen(natural: Sequence[int], least: Sequence[int], width: int) -> list[int]:
    """What room is left goes to the columns that want more, from the last, where the prose is."""
    widths = list(least)
    left = max(0, width - sum(least) - TIGHT * (len(least) - 1))
    for i in reversed(range(len(least))):
        more = min(left, natural[i] - widths[i])
        widths[i] += more
        left -= more
    return widths


def _table(title: str, cells: Sequence[Sequence[str]], widths: Sequence[int], separator: int) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    padding = (0, separator - TIGHT, 0, 1)
    table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=padding)
    for column, width in zip(cells, widths, strict=True):
        table.add_column(Text(column[0]), overflow="fold", width=width)
    for row in zip(*(column[1:] for column in cells), strict=True):
        table.add_row(*map(Text, row))  # of a string, rich would take "[dim]" for a style
    return table
