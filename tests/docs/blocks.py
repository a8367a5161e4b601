"""The fenced blocks of a Markdown page, with the line on which each begins."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

NOT_RUN = re.compile(r"<!-- not run: (?P<reason>.+?) -->")


@dataclass(frozen=True)
class Block:
    """One block.

    Attributes:
        page: the file. line: of its first line of code, from 1. language: the word after the fence.
        not_run: the reason in a comment directly before it, `<!-- not run: reason -->`, or None.
    """

    page: Path
    line: int
    language: str
    code: str
    not_run: str | None = None

    def __str__(self) -> str:
        return f"{self.page.name}, line {self.line}"


def blocks_of(page: Path) -> list[Block]:
    """All fenced blocks of a page; a fence may be indented."""
    found: list[Block] = []
    lines = page.read_text(encoding="utf-8").splitlines()
    number = 0
    while number < len(lines):
        stripped = lines[number].lstrip()
        if not stripped.startswith("```"):
            number += 1
            continue
        indent = len(lines[number]) - len(stripped)
        before = lines[number - 1].strip() if number else ""
        comment = NOT_RUN.fullmatch(before)
        end = next(i for i in range(number + 1, len(lines)) if lines[i].lstrip().startswith("```"))
        code = "\n".join(line[indent:] for line in lines[number + 1 : end])
        reason = None if comment is None else comment["reason"]
        found.append(Block(page, number + 2, stripped[3:].strip(), code + "\n", reason))
        number = end + 1
    return found


@dataclass(frozen=True)
class Command:
    """One command of a bash block. words: without comments and assignments in front. code: exit code it should have."""

    words: list[str]
    code: int = 0


def commands_of(block: Block) -> list[Command]:
    """The commands of a block; a line that ends in a backslash goes on."""
    found = []
    for line in block.code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if words:
            code = re.search(r"# exit code (\d)", line)
            found.append(Command(words, int(code[1]) if code else 0))
    return found
