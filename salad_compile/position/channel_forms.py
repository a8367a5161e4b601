"""Values in symbols: which channel of a projection, times which entry of a table, each element is.

A value's channels are written out; its samples and tokens, whose rows all fare alike, are one entry each. An element is
a sum of at most two terms: a channel of the value that all begins with, times an entry of a table or times 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

BATCH, TOKENS = "batch", "tokens"
SOURCE, TABLE, ENTRY, SIGN = range(4)
NOTHING, UNWRITTEN = -1, -2
"""In the place of a term's channel: there is no such term; memory that nobody has written."""
FACTOR_ONE = -1
"""In the place of a term's table."""


class UnknownFormError(Exception):
    """Why the kernel does not know what is computed; a clause."""


@dataclass(frozen=True)
class Table:
    """A tensor that channels are multiplied with. axes: what each of its dimensions is; None for channels.

    is_complex: its entries have two parts, which count as one more dimension.
    """

    node: fx.Node
    axes: tuple[str | None, ...]
    sizes: tuple[int, ...]
    is_complex: bool


@dataclass(frozen=True)
class Form:
    """A value in symbols.

    Attributes:
        axes: of each dimension, `BATCH`, `TOKENS`, or None for one of channels.
        shape: its sizes, those of batch and tokens as they were recorded.
        terms: int (*sizes, 2, 4), with 1 for batch and tokens: two terms (channel, table, entry, sign) an element.
        is_complex: whether the last dimension is the two parts of complex numbers, which `shape` does not count.
    """

    axes: tuple[str | None, ...]
    shape: tuple[Any, ...]
    terms: np.ndarray[Any, Any]
    is_complex: bool = False

    @classmethod
    def of_channels(cls, axes: Sequence[str | None], shape: Sequence[Any]) -> Form:
        """The value that a slice begins with: channels are numbered in the order of its dimensions."""
        sizes = channel_sizes(axes, shape)
        terms = np.full((*sizes, 2, 4), NOTHING, dtype=np.int64)
        terms[..., 0, SOURCE] = np.arange(int(np.prod(sizes))).reshape(sizes)
        terms[..., SIGN] = 1
        return cls(tuple(axes), tuple(shape), terms)

    @property
    def channels(self) -> list[int]:
        """The dimensions that are no batch and no tokens."""
        return [at for at, axis in enumerate(self.axes) if axis is None]


def channel_sizes(axes: Sequence[str | None], shape: Sequence[Any]) -> tuple[int, ...]:
    known = [1 if axis is not None else size for axis, size in zip(axes, shape, strict=True)]
    if not all(isinstance(size, int) for size in known):
        raise UnknownFormError("the number of its channels is symbolic")
    return tuple(known)


def is_same(one: Any, other: Any) -> bool:
    """Whether two sizes are known to be equal."""
    return one is other or statically_known_true(one == other)


def axes_after(form: Form, shape: tuple[Any, ...]) -> tuple[str | None, ...]:
    """Which dimensions of a reshaped value are batch and tokens."""
    axes: list[str | None] = []
    held = 1  # channels of the dimensions that are being cut or joined
    rest = list(shape)

    def take() -> Any:
        if not rest:
            raise UnknownFormError("a view joins its tokens or samples with something else")
        return rest.pop(0)

    for axis, size in zip(form.axes, form.shape, strict=True):
        if axis is None:
            held *= size
            while rest and held > 1 and isinstance(rest[0], int) and rest[0] <= held and held % rest[0] == 0:
                held //= take()
                axes.append(None)
            continue
        while rest and not is_same(rest[0], size) and is_same(rest[0], 1):
            take()
            axes.append(None)
        if held != 1 or not is_same(take(), size):
            raise UnknownFormError("a view joins its tokens or samples with something else")
        axes.append(axis)
    axes += [None] * len(rest)
    if held != 1 or not all(is_same(size, 1) for size in rest):
        raise UnknownFormError("a view joins its tokens or samples with something else")
    return tuple(axes)


def index_of(form: Form, index: Any) -> Form:
    """A basic index: whole dimensions of batch and tokens, anything of channels. The terms are a view."""
    if form.is_complex:
        raise UnknownFormError("it takes parts of complex numbers")
    given = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(entry, (fx.Node, list)) for entry in given):
        raise UnknownFormError("it takes rows or channels by an index that is data")
    taken = sum(entry is not None and entry is not Ellipsis for entry in given)
    if Ellipsis not in given:
        given.append(Ellipsis)
    at = given.index(Ellipsis)
    given[at : at + 1] = [slice(None)] * (len(form.axes) - taken)
    axes: list[str | None] = []
    shape: list[Any] = []
    dimension = 0
    for entry in given:
        if entry is None:
            axes.append(None)
            shape.append(1)
            continue
        axis, size = form.axes[dimension], form.shape[dimension]
        dimension += 1
        if axis is not None:
            if entry != slice(None):
                raise UnknownFormError("position is applied to some of its tokens alone")
            axes.append(axis)
            shape.append(size)
        elif isinstance(entry, slice):
            if any(isinstance(part, fx.Node) for part in (entry.start, entry.stop, entry.step)):
                raise UnknownFormError("it takes channels by a symbolic index")
            axes.append(None)
            shape.append(len(range(size)[entry]))
        elif not isinstance(entry, int) or isinstance(entry, bool):
            raise UnknownFormError("it takes channels by an index that is no number")
    return Form(tuple(axes), tuple(shape), form.terms[tuple(given)])
