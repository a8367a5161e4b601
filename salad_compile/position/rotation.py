"""A rotation of channels in pairs: what position encodings come to, as `salad::prepare_operand` computes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from salad_compile.position.channel_forms import (
    BATCH,
    ENTRY,
    FACTOR_ONE,
    NOTHING,
    SIGN,
    SOURCE,
    TABLE,
    TOKENS,
    Form,
    Table,
    UnknownFormError,
)

_Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class TableView:
    """The entries of a table that the pairs of every head take.

    Attributes:
        table: what they are of.
        index: what to take of each of its dimensions of channels: a number, a slice for the pairs, or None for heads.
        split: the dimension that holds heads and pairs in one, to be cut into as many heads, or None.
        negated: whether they are to be multiplied by -1.
        pairs: how many there are; a table without a dimension for them has one entry for all.
    """

    table: Table
    index: tuple[int | tuple[int, int, int] | None, ...]
    split: tuple[int, int] | None
    negated: bool
    pairs: int

    def of(self, tensor: Any) -> Any:
        """(B or 1, H or 1, S or 1, P) of the table's tensor. For tensors and for `fx.Proxy` objects."""
        axes: list[Any] = list(self.table.axes)
        if self.table.is_complex:
            tensor = torch.view_as_real(tensor)
            axes.append(None)
        channels = [at for at, axis in enumerate(axes) if axis is None]
        if self.split is not None:
            at, heads = channels[self.split[0]], self.split[1]
            tensor = tensor.unflatten(at, (heads, -1))
            axes.insert(at, None)
            channels = [at for at, axis in enumerate(axes) if axis is None]
        index: list[Any] = [slice(None)] * len(axes)
        kinds: list[Any] = axes
        for at, taken in zip(channels, self.index, strict=True):
            index[at] = slice(*taken) if isinstance(taken, tuple) else slice(None) if taken is None else taken
            kinds[at] = "pairs" if isinstance(taken, tuple) else "heads" if taken is None else None
        tensor = tensor[tuple(index)]
        kept = [kind for kind in kinds if kind is not None]
        wanted = [kind for kind in (BATCH, "heads", TOKENS, "pairs") if kind in kept]
        tensor = tensor.permute([kept.index(kind) for kind in wanted])
        for at, kind in enumerate((BATCH, "heads", TOKENS, "pairs")):
            tensor = tensor if kind in wanted else tensor.unsqueeze(at)
        tensor = -tensor if self.negated else tensor
        return tensor if "pairs" in wanted else tensor.expand(-1, -1, -1, self.pairs)


@dataclass(frozen=True)
class Rotation:
    """Channels turned in pairs: "interleaved" or "halves" (see `prepare_operand`), by two tables or four."""

    pairs: str
    tables: tuple[TableView, ...]


def rotation_of(plain: Form, rotated: Form, tables: list[Table], heads: int, head_dim: int) -> Rotation:
    """The rotation that makes one form of another.

    Args:
        plain: the operand's layout: which channel each of its elements is. rotated: what they become.

    Raises:
        UnknownFormError: they are related in another way.
    """
    if plain.axes != rotated.axes or plain.terms.shape != rotated.terms.shape or plain.is_complex or rotated.is_complex:
        raise UnknownFormError("position changes its layout")
    channel = plain.terms[..., 0, SOURCE].flatten()
    untouched = (plain.terms[..., 0, TABLE] == FACTOR_ONE).all() and (plain.terms[..., 1, SOURCE] == NOTHING).all()
    if not untouched or (plain.terms[..., 0, SIGN] != 1).any() or sorted(channel) != list(range(heads * head_dim)):
        raise UnknownFormError("its channels are not all there once")
    terms = np.empty((heads * head_dim, 2, 4), dtype=np.int64)
    terms[channel] = rotated.terms.reshape(-1, 2, 4)
    own, other = _ordered(terms)
    offsets = own[:, SOURCE] % head_dim
    turned = other[:, SOURCE] != NOTHING
    width = int(turned.reshape(heads, head_dim)[0].sum())
    if width % 2 or not width or not (turned == (offsets < width)).all():
        raise UnknownFormError("other channels are turned than the first ones of each head")
    if (own[~turned][:, TABLE] != FACTOR_ONE).any() or (own[~turned][:, SIGN] != 1).any():
        raise UnknownFormError("channels are scaled that are not turned")
    pairs, first, second = _pairing(own, other, offsets, turned, width)
    parts = [(own[first], 1), (other[first], -1), (other[second], 1), (own[second], 1)]
    cos, sin, other_sin, other_cos = (_view(part, sign, tables, heads) for part, sign in parts)
    return Rotation(pairs, (cos, sin) if (cos, sin) == (other_cos, other_sin) else (cos, sin, other_sin, other_cos))


def _ordered(terms: _Array) -> tuple[_Array, _Array]:
    """For each channel the term of itself, and the other."""
    is_own = terms[..., SOURCE] == np.arange(len(terms))[:, None]
    if (is_own.sum(1) != 1).any():
        raise UnknownFormError("a channel becomes something else than itself and another")
    return terms[is_own], terms[~is_own]


def _pairing(own: _Array, other: _Array, offsets: _Array, turned: _Array, width: int) -> tuple[str, _Array, _Array]:
    """How channels are paired, and which are first and which second ones of pairs, in the order of heads and pairs."""
    distance = other[:, SOURCE] - own[:, SOURCE]
    for pairs, is_first, step in (
        ("interleaved", offsets % 2 == 0, 1),
        ("halves", offsets < width // 2, width // 2),
    ):
        if (distance[turned] == np.where(is_first, step, -step)[turned]).all():
            return pairs, np.flatnonzero(turned & is_first), np.flatnonzero(turned & ~is_first)
    raise UnknownFormError("its channels are paired in another way than neighbours or halves")


def _view(terms: _Array, sign: int, tables: list[Table], heads: int) -> TableView:
    """The view of one table whose entries, by heads and pairs, some terms are `sign` times multiplied with."""
    numbers, signs = set(terms[:, TABLE].tolist()), set(terms[:, SIGN].tolist())
    if len(numbers) != 1 or len(signs) != 1 or numbers == {FACTOR_ONE}:
        raise UnknownFormError("pairs are multiplied from different tables")
    table = tables[numbers.pop()]
    sizes = [size for axis, size in zip(table.axes, table.sizes, strict=True) if axis is None]
    sizes += [2] if table.is_complex else []
    entries = terms[:, ENTRY].reshape(heads, -1)  # (heads, pairs)
    per_head = (entries != entries[:1]).any()
    split: tuple[int, int] | None = None
    if per_head:
        at = next((at for at, size in enumerate(sizes) if size == heads), None)
        if at is None:
            at = next((at for at, size in enumerate(sizes) if size % heads == 0 and size > heads), None)
            if at is None:
                raise UnknownFormError("its heads take a table in another way than one after another")
            sizes[at : at + 1] = [heads, sizes[at] // heads]
            split = (at, heads)
    index = [_taken(part, heads) for part in np.unravel_index(entries, sizes)] if sizes else []
    if sum(isinstance(taken, tuple) for taken in index) > 1 or sum(taken is None for taken in index) > 1:
        raise UnknownFormError("its pairs take the entries of a table in another order than theirs")
    return TableView(table, tuple(index), split, signs != {sign}, entries.shape[1])


def _taken(part: _Array, heads: int) -> int | tuple[int, int, int] | None:
    """What heads and pairs take of one dimension of a table."""
    if (part == part[0, 0]).all() and part.shape[1] > 1:
        return int(part[0, 0])
    if heads > 1 and (part == np.arange(heads)[:, None]).all():
        return None
    step = int(part[0, 1] - part[0, 0]) if part.shape[1] > 1 else 1
    first, count = int(part[0, 0]), part.shape[1]
    if step < 1 or (part != first + step * np.arange(count)[None, :]).any():
        raise UnknownFormError("its pairs take the entries of a table in another order than theirs")
    return (first, first + step * (count - 1) + 1, step)
