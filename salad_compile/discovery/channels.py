"""Which channels of a projection's output a value is made of: a fused projection may serve more than attention.

While a value is only looked at in other ways (split, reshaped, permuted), a tensor of channel numbers goes the same way
as views, which takes no memory. From the first other operation on a value has the channels of its operands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Private; seen in torch 2.11 and 2.13 (tests/salad_compile/discovery/test_channels.py).
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from salad_compile.common.torch_calls import argument_of, name_of
from salad_compile.position.operations import LIKE_ANOTHER, MOVES

_VIEW_NAMES = (
    "view reshape flatten unflatten transpose swapaxes swapdims permute movedim moveaxis squeeze unsqueeze getitem "
    "narrow select split split_with_sizes chunk tensor_split unbind view_as"
)
_VIEWS = frozenset(_VIEW_NAMES.split())
_SAME_NAMES = "contiguous clone to float half bfloat16 double type type_as detach"
_SAME = frozenset(_SAME_NAMES.split())
_JOINS = frozenset({"cat", "concat", "concatenate", "stack"})
_NO_DATA_NAMES = "size shape stride dim numel empty_like zeros_like ones_like full_like new_empty new_zeros"
_NO_DATA = frozenset(_NO_DATA_NAMES.split())


Made = Mapping[Any, Tensor]
"""Source -> bool (C,), which channels of its output."""


@dataclass(frozen=True)
class Channels:
    """What a value is made of.

    of: the whole value. numbers: channels of the only source, int32 in the shape of the value, as long as nothing was
    computed. pieces: what the rows along its first axis are made of, where values were joined along it; `which` is the
    piece of each row, int32 in the shape of the value.
    """

    of: Made
    numbers: Tensor | None = None
    pieces: tuple[Made, ...] = ()
    which: Tensor | None = None


class ChannelTracker:
    """Follows the channels of projections through the operations of one forward."""

    def __init__(self) -> None:
        self._known: Any = WeakIdKeyDictionary()

    def add_source(self, source: Any, out: Tensor) -> None:
        """The output of a projection, (..., C), under a key of the caller's."""
        width = out.shape[-1]
        with unset_fake_temporarily():
            numbers = torch.arange(width, dtype=torch.int32, device="cpu").expand(tuple(out.shape))
            self._known[out] = Channels({source: torch.ones(width, dtype=torch.bool, device="cpu")}, numbers)

    def sources(self, value: Tensor) -> set[Any] | None:
        """The sources of a value; None if that is not known."""
        known = self._known.get(value)
        return None if known is None else set(known.of)

    def span(self, value: Tensor, source: Any) -> tuple[int, int] | None:
        """First channel of a source in a value, and the one behind the last; None unless they are one run."""
        known = self._known.get(value)
        if known is None or source not in known.of:
            return None
        with unset_fake_temporarily():
            places = known.of[source].nonzero().flatten().tolist()
        whole = places and places[-1] - places[0] + 1 == len(places)
        return (places[0], places[-1] + 1) if whole else None

    def note(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        """The next operation."""
        name, writes = name_of(function, args)
        data = args[:1] if name in LIKE_ANOTHER else (args, kwargs)
        known = (leaf for leaf in tree_leaves(data) if isinstance(leaf, Tensor) and leaf in self._known)
        given = [leaf for leaf in known if leaf.numel()]  # without elements it has no channels
        if not given or name in _NO_DATA:
            return
        with unset_fake_temporarily():
            if writes:
                self._write(name, args, given)
            else:
                self._compute(name, function, args, kwargs, out, given)

    def _compute(
        self, name: str, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any, given: list[Tensor]
    ) -> None:
        joined = self._joined(name, args, kwargs, out)
        if joined is not None:
            self._known[out] = joined
        elif len(given) > 1 or not self._follow(name, function, args, kwargs, out, self._known[given[0]]):
            known = [self._known[value] for value in given]
            for result in _tensors(out):
                by_rows = name not in MOVES or name in _JOINS
                grown = name == "stack"
                self._known[result] = _of_rows(known, tuple(result.shape), grown) if by_rows else _merged(known)

    def _follow(
        self, name: str, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any, known: Channels
    ) -> bool:
        """Let what is known of each element go the way of a value; False if that is not possible."""
        shadow = known.numbers if known.which is None else known.which
        if shadow is None:
            return False
        if name in _SAME and isinstance(out, Tensor) and out.shape == shadow.shape:
            self._known[out] = known
            return True
        tensors = sum(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs)))
        if name not in _VIEWS or (tensors != 1 and name not in LIKE_ANOTHER):
            return False
        results = list(_tensors(out))
        moved = _views(name, function, args, kwargs, shadow, [tuple(result.shape) for result in results])
        if moved is None:
            return False
        for result, part in zip(results, moved, strict=True):
            self._known[result] = _narrowed(known, part)
        return True

    def _joined(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Channels | None:
        """Values that are joined along the first axis, or None."""
        parts = kwargs.get("tensors", args[0] if args else None)
        dim = argument_of(args, kwargs, 1, "dim", 0)
        if name not in _JOINS or dim not in (0, -out.dim()):
            return None
        if not all(part in self._known for part in parts):
            return None
        pieces: list[Made] = []
        numbers: list[int] = []
        for part in parts:
            known = self._known[part]
            rows = 1 if name == "stack" else part.shape[0]
            column = None if known.which is None or name == "stack" else _first_axis(known.which)
            numbers += [len(pieces)] * rows if column is None else [len(pieces) + n for n in column]
            pieces += [known.of] if column is None else known.pieces
        return _with_pieces(pieces, _along_first(numbers, tuple(out.shape)))

    def _write(self, name: str, args: Sequence[Any], given: Sequence[Tensor]) -> None:
        """A value is written into another one, or changed where it is."""
        target = args[0]
        if not isinstance(target, Tensor):
            return
        before = self._known.get(target, Channels({}))
        others = [self._known[value] for value in given if value is not target]
        if name == "setitem" and before.which is not None and len(others) == 1 and others[0].which is not None:
            place = before.which[args[1]] if not _holds_tensors(args[1]) else None
            new = others[0]
            if place is not None and place.shape == new.which.shape:
                pairs = set(zip(_first_axis(place) or (), _first_axis(new.which) or (), strict=True))
                if pairs:
                    pieces = list(before.pieces)
                    for old, own in pairs:
                        pieces[old] = _union([pieces[old], new.pieces[own]])
                    self._known[target] = _with_pieces(pieces, before.which)
                    return
        self._known[target] = (
            _of_rows([before, *others], tuple(target.shape)) if name != "setitem" else _merged([before, *others])
        )


def _merged(known: Sequence[Channels]) -> Channels:
    return Channels(_union([each.of for each in known]))


def _union(made: Sequence[Made]) -> Made:
    of: dict[Any, Tensor] = {}
    for each in made:
        for source, mask in each.items():
            before = of.get(source)
            of[source] = mask if before is None or before is mask else before | mask
    return of


def _of_rows(known: Sequence[Channels], shape: tuple[int, ...], grown: bool = False) -> Channels:
    """What is computed of some values, row by row along the first axis where that may be.

    Args:
        shape: of the result. grown: whether it has an axis more than the values.
    """
    with_pieces = [each for each in known if each.which is not None]
    columns = [(_first_axis(each.which), each.which.dim()) for each in with_pieces]  # type: ignore[arg-type,union-attr]
    if not columns or any(column != (columns[0][0], len(shape) - grown) for column in columns):
        return _merged(known)
    rows = columns[0][0]
    if rows is None or len(rows) != shape[0]:
        return _merged(known)
    others = [each.of for each in known if each.which is None]
    counts = range(len(with_pieces[0].pieces))
    if any(len(each.pieces) != len(counts) for each in with_pieces):
        return _merged(known)
    pieces = [_union([*(each.pieces[n] for each in with_pieces), *others]) for n in counts]
    return _with_pieces(pieces, _along_first(rows, shape))


def _with_pieces(pieces: Sequence[Made], which: Tensor) -> Channels:
    kept = sorted(set(_first_axis(which) or range(len(pieces))))
    return Channels(_union([pieces[n] for n in kept]), None, tuple(pieces), which)


def _along_first(numbers: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    column = torch.tensor(numbers, dtype=torch.int32, device="cpu")
    return column.view(-1, *[1] * (len(shape) - 1)).expand(shape)


def _first_axis(which: Tensor) -> list[int] | None:
    """The piece of each row, if nothing changes along other axes."""
    if any(step and size > 1 for step, size in zip(which.stride()[1:], which.shape[1:], strict=True)):
        return None
    first = which
    while first.dim() > 1:
        first = first.select(-1, 0)
    return [int(number) for number in first]


def _holds_tensors(index: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves(index))


def _views(
    name: str,
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    numbers: Tensor,
    shapes: Sequence[tuple[int, ...]],
) -> list[Tensor] | None:
    """The results for the numbers, none of which is a copy; None if that is not possible."""
    try:
        if name in ("view", "reshape", "flatten", "unflatten", "view_as"):  # reshape would copy
            return [numbers.view(shapes[0])]
        mapped, named = tree_map_only(Tensor, lambda _: numbers, (tuple(args), dict(kwargs)))
        results = list(_tensors(function(*mapped, **named)))
    except (RuntimeError, TypeError, IndexError):
        return None
    storage = numbers.untyped_storage().data_ptr()
    own = all(result.untyped_storage().data_ptr() == storage for result in results)
    return results if own and [tuple(result.shape) for result in results] == list(shapes) else None


def _narrowed(known: Channels, shadow: Tensor) -> Channels:
    """What is left of a value in a view of it."""
    # the same along these axes; a view without elements has none to take
    places = tuple(0 if step == 0 and shadow.numel() else slice(None) for step in shadow.stride())
    kept = torch.unique(shadow[places]).long()
    if known.which is not None:
        if len(kept) == 1:
            return Channels(known.pieces[int(kept)])
        return Channels(_union([known.pieces[int(n)] for n in kept]), None, known.pieces, shadow)
    ((source, mask),) = known.of.items()
    part = torch.zeros_like(mask)
    part[kept] = True
    return Channels({source: part}, shadow)


def _tensors(out: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor))


def spans_of_roles(
    operands: Sequence[Tensor], streams: Sequence[Sequence[Any]], tracker: ChannelTracker
) -> dict[str, tuple[int, int]]:
    """Role -> first channel and end, for the roles whose projections have channels that attention does not read.

    Args:
        operands: query, key and value. streams: for each the projections of video and text (None: there is none).
    """
    found: dict[str, tuple[int, int]] = {}
    if not streams:
        return found
    for stream, prefix in enumerate(("", "text_")):
        groups: dict[Any, dict[str, tuple[int, int] | None]] = {}
        widths = {}
        for role, operand, made in zip(("query", "key", "value"), operands, streams, strict=True):
            projection = made[stream]
            if projection is not None:
                groups.setdefault(projection.node, {})[prefix + role] = tracker.span(operand, projection.node)
                widths[projection.node] = projection.width
        for node, spans in groups.items():
            known = [span for span in spans.values() if span is not None]
            covered = {channel for start, end in known for channel in range(start, end)}
            if len(known) == len(spans) and len(covered) < widths[node]:
                found.update(zip(spans, known, strict=True))
    return found
