"""Which tokens of a value another value was computed from: ranges along the token axis of (B, tokens, C) tensors.

Models concatenate text and video, and slice them apart again: the slice is video although the concatenation is not.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

# An autograd node and which of its outputs is meant, as in `next_functions`.
Edge = tuple[Any, int]


@dataclass(frozen=True)
class Cat:
    """A concatenation: its dimension, counted from the end, and for each part its length and autograd edge."""

    dim: int
    sizes: tuple[int, ...]
    edges: tuple[Edge, ...]


@dataclass(frozen=True)
class TokenRange:
    """Tokens [start, stop) of `length`."""

    length: int
    start: int
    stop: int

    def parts(self, cat: Cat) -> list[tuple[Edge, TokenRange | None]]:
        """The parts of a concatenation of this length that hold some of these tokens, and which of them."""
        found: list[tuple[Edge, TokenRange | None]] = []
        for edge, end, size in zip(cat.edges, itertools.accumulate(cat.sizes), cat.sizes, strict=True):
            begin = end - size
            if end > self.start and begin < self.stop:
                found.append((edge, TokenRange(size, max(self.start - begin, 0), min(self.stop, end) - begin)))
        return found

    def within(self, length: int, start: int, stop: int) -> TokenRange:
        """These tokens of a slice [start, stop) as tokens of its source; all of the slice if this is not its length."""
        if self.length == stop - start:
            return TokenRange(length, start + self.start, start + self.stop)
        return TokenRange(length, start, stop)


def narrow(node: Any, output: int, span: TokenRange | None) -> TokenRange | None:
    """The tokens of a slicing node's source that `span` of its result was computed from; `span` for any other node.

    Reads what autograd saves for slices and splits (torch 2.11 and 2.13;
    tests/salad_compile/discovery/test_segments.py fails when it changes).
    """
    name = type(node).__name__
    if name not in ("SliceBackward0", "SplitWithSizesBackward0", "SplitBackward0"):
        return span
    sizes, dim = node._saved_self_sym_sizes, _to_signed(node._saved_dim)
    if len(sizes) != 3 or dim not in (1, -2):
        return span
    length = int(sizes[dim])
    start, stop = _bounds(node, output, length)
    whole = TokenRange(stop - start, 0, stop - start) if span is None else span
    return whole.within(length, start, stop)


def _bounds(node: Any, output: int, length: int) -> tuple[int, int]:
    if type(node).__name__ == "SliceBackward0":
        start, stop = (_edge(edge, length) for edge in (node._saved_start, node._saved_end))
        return start, stop
    if type(node).__name__ == "SplitBackward0":
        size = int(node._saved_split_size)
        return output * size, min((output + 1) * size, length)
    ends = list(itertools.accumulate(int(size) for size in node._saved_split_sizes))
    return ends[output] - int(node._saved_split_sizes[output]), ends[output]


def _edge(value: Any, length: int) -> int:
    """A bound of a slice as a position in 0 .. length."""
    bound = _to_signed(value)
    return min(max(bound + length if bound < 0 else bound, 0), length)


def _to_signed(value: Any) -> int:
    """Autograd shows negative numbers as unsigned 64-bit ones."""
    number = int(value)
    return number - 2**64 if number >= 2**63 else number
