"""Reading machine code as cuobjdump prints it: its loops, and what they keep in memory for want of registers."""

from __future__ import annotations

import re

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,6})\*/\s+(.*?);", re.MULTILINE)
_BRANCH = re.compile(r"\bBRA\b.*?0x([0-9a-f]+)")
_SPILL = re.compile(r"\b(?:LDL|STL)(?:\.\w+)*")
_PRODUCT = "HGMMA"


def product_loops(code: str) -> list[list[str]]:
    """The instructions of the innermost loops that have matrix products of Hopper.

    A loop reaches from where a branch leads back to up to that branch.
    """
    lines = _LINE.findall(code)
    places = {int(place, 16): number for number, (place, _) in enumerate(lines)}
    text = [instruction for _, instruction in lines]
    spans = []
    for number, instruction in enumerate(text):
        target = _BRANCH.search(instruction)
        start = places.get(int(target[1], 16), number) if target else number
        if any(_PRODUCT in line for line in text[start:number]):
            spans.append((start, number))
    inner: list[tuple[int, int]] = []
    for start, end in sorted(spans, key=lambda span: span[1] - span[0]):
        # code that waits once more stands behind everything and jumps back: that makes no loop of what lies between
        if all(end < first or last < start for first, last in inner):
            inner.append((start, end))
    return [text[start : end + 1] for start, end in sorted(inner)]


def spills_in_product_loops(code: str) -> int:
    """How many instructions there load or store registers that did not suffice."""
    return sum(bool(_SPILL.search(line)) for body in product_loops(code) for line in body)
