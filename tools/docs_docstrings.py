"""An extension of griffe, which reads docstrings for mkdocstrings: ours, in the form that it knows.

Cross-references of Sphinx become plain code. Under "Raises:" griffe wants one entry a line and nothing else; ours are
running text, several errors to a line, sometimes with a sentence about all of them at the end.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|data|mod):`~?(?:salad_compile\.)?([^`]+)`")
RAISES = re.compile(r"^(?P<indent> *)Raises:\n(?P<body>(?:(?P=indent) +.*\n?)+)", re.MULTILINE)
ENTRY = re.compile(r"(?:(?<=[.:] )|^)(?=(?:\w+Error, )*\w+Error: )")
ABOUT_ALL = re.compile(r" (?=(?:Whatever|Whichever|Then|Others) )")


class Docstrings(griffe.Extension):
    """Rewrites every docstring."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """After griffe has read an object."""
        if obj.docstring is not None:
            obj.docstring.value = plain(obj.docstring.value)


def plain(docstring: str) -> str:
    """The docstring without roles, and with one error a line."""
    return RAISES.sub(_raises, ROLE.sub(r"`\1`", docstring))


def _raises(match: re.Match[str]) -> str:
    indent = match["indent"]
    entries, *about_all = ABOUT_ALL.split(" ".join(match["body"].split()), maxsplit=1)
    lines = [f"{indent}    {entry.strip()}" for entry in ENTRY.split(entries) if entry.strip()]
    return "\n".join([f"{indent}Raises:", *lines, *(f"\n{indent}{text}" for text in about_all), ""])
