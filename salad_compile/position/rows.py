"""Which row of a projection's output each token of a later value is.

Every value that derives from a projection has a shadow: an int64 tensor on the CPU with the value's shape, whose
entries number the rows of the projection's output. What only moves a value (a view, a slice, a roll) is run on its
shadow. Of everything else the result has the rows of its operands. So the answer is exact whatever the moves are, and a
value whose rows cannot be known says why.

Shadows are cheap: along axes where nothing changes, such as the channels, they are expanded and take no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

# Private; seen in torch 2.11 and 2.13 (tests/salad_compile/position/test_private_names.py).
from torch._subclasses.fake_tensor import is_fake, unset_fake_temporarily

from salad_compile.common.torch_calls import name_of
from salad_compile.position import shadows as sh
from salad_compile.position.kept_rows import Entries, Operation, carry
from salad_compile.position.operations import (
    BLANKS,
    LIKE_ANOTHER,
    SIZES,
    is_foreign,
    may_communicate,
    written_by_schema,
)
from salad_compile.position.row_reader import FOLLOWED, RowReader, Rows, Values, leaves
from salad_compile.position.run_rows import OperatorRuns, like
from salad_compile.position.shadows import UnknownError, share_memory

_PLACED = frozenset({"index_put", "index_copy", "scatter", "index_fill", "slice_scatter", "select_scatter"})
_SEVERAL_IN_ONE = "its heads are of different samples or tokens: heads and batch are one axis"
_FILLED = frozenset({"ones", "full", "ones_like", "full_like", "new_ones", "new_full"})


class RowTracker(RowReader):
    """Follows rows through the operations of one forward or graph.

    Args:
        table: value -> its rows. values: how to read them. entries: how entries of shadows are combined.
    """

    def __init__(self, table: MutableMapping[Any, Rows], values: Values, entries: Entries | None = None) -> None:
        super().__init__(table, values, entries)
        self.sources = 0  # rows so far
        self._runs = OperatorRuns()
        # value -> the value that it is a view of, and what makes its shadow from that one's
        self._views: MutableMapping[Any, tuple[Any, Callable[[Tensor], Tensor]]]
        self._views = type(table)()  # type: ignore[assignment]

    def add_source(self, value: Any) -> int:
        """The output of a projection, (..., C). Returns the number of its first row; the others follow."""
        shape = self.shape(value)
        assert shape is not None
        first, count = self.sources, torch.Size(shape[:-1]).numel()
        self.sources += count
        with unset_fake_temporarily():
            rows = torch.arange(first, first + count, device="cpu").view(*shape[:-1], 1)
            self.table[value] = Rows(rows.expand(shape))
        return first

    def rows(self, value: Any, heads_first: Callable[[Any], Any] = lambda tensor: tensor) -> Tensor | str:
        """Row of each token of an operand, (B, S), or why that is not known.

        Args:
            heads_first: lays the operand out as (B, H, S, D).
        """
        known = self.table.get(value)
        if known is None:
            return "how it came from the projection was not seen"
        if known.shadow is None:
            return known.reason
        with unset_fake_temporarily():
            shadow = heads_first(known.shadow)
            if shadow.dim() != 4:
                return "it is laid out in an unknown way"
            rows = sh.one_per_token(shadow, self.entries.blank)
            return _SEVERAL_IN_ONE if rows is None else rows

    def note(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        """The next operation."""
        name, writes = name_of(function, args)
        if name in BLANKS or name in _FILLED:
            with unset_fake_temporarily():
                self.table.update(self._blank(self._tensors(out)))
            return
        inputs = [value for value in leaves((args, kwargs)) if self._is_known(value)]
        if not inputs or name in SIZES or (name in LIKE_ANOTHER and not self._is_known(args[0])):
            return
        with unset_fake_temporarily():
            try:
                self._note(name, writes, function, args, kwargs, out, inputs)
            except (RuntimeError, TypeError, IndexError, ValueError):  # never the model's fault, and never its end
                for value in self._tensors(out):
                    self.table[value] = self._lost(f"{name} cannot be followed", value, inputs)

    def _note(
        self,
        name: str,
        writes: bool,
        function: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        out: Any,
        inputs: Sequence[Any],
    ) -> None:
        if is_foreign(function) and self._note_run(name, function, args, kwargs, out, inputs):
            return
        target = kwargs["out"] if "out" in kwargs else (args[0] if writes and args else None)
        if target is None:
            outs, inputs = self._tensors(out), self._filled(inputs)
            read = self._read(name, function, args, kwargs, outs, inputs) if inputs else self._blank(outs)
            for value, rows in read.items():
                self.table[value] = rows
                if value in self._views or not args or value is args[0] or not self._is_known(args[0]):
                    continue  # what gives its operand back is no view of it
                if self.values.share(value, args[0]):
                    self._note_view(value, name, function, args, kwargs, out)
            return
        try:
            after = self._written(name, function, target, args, kwargs, inputs)
        except UnknownError as error:
            self._store(target, self._lost(str(error), target, [target, *inputs]))
        else:
            known = self.table.get(target)
            if known is None or known.shadow is None or not sh.equal(known.shadow, after):
                self._store(target, Rows(after))
        for value in self._tensors(out):
            if value is not target:  # a node stands for what is returned
                self.table[value] = self.table[target]
                self._views[value] = (target, _itself)

    def _note_run(
        self, name: str, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any, inputs: Sequence[Any]
    ) -> bool:
        """An operator that is not torch's: its rows are seen by running it. False where that was not needed."""
        written = [value for value in written_by_schema(function, args, kwargs) if self.shape(value) is not None]
        outs, filled = self._tensors(out), self._filled(inputs)
        if not filled:
            return False
        try:
            if may_communicate(function):
                raise UnknownError("it may exchange tokens with other processes")
            shadows = {id(value): self._shadow(value) for value in filled}
            found = self._runs.rows(function, args, kwargs, shadows, self.values.stand_in, self.entries.blank, written)
            if [tuple(shadow.shape) for shadow in found] != [self.shape(value) for value in (*outs, *written)]:
                raise UnknownError("it has results of other shapes")
            rows = [Rows(shadow) for shadow in found]
        except UnknownError as error:
            reason = str(error) if str(error).startswith("which") else f"{name} is not torch's, and {error}"
            rows = [self._lost(reason, value, inputs) for value in (*outs, *written)]
        self.table.update(zip(outs, rows, strict=False))
        for value, known in zip(written, rows[len(outs) :], strict=True):
            self._store(value, known)
        return True

    def _written(
        self,
        name: str,
        function: Any,
        target: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        inputs: Sequence[Any],
    ) -> Tensor:
        """The shadow of what is written into, after that."""
        shape = tuple(self.shape(target) or ())
        if "out" in kwargs:
            given = {key: value for key, value in kwargs.items() if key != "out"}
            others = self._filled([value for value in inputs if value is not target])
            after = self._read(name, function, args, given, [target], others)[target]
            if after.shadow is None:
                raise UnknownError(after.reason)
            return after.shadow
        blank = sh.blank(shape, self.entries.blank)
        before = self._shadow(target) if self._is_known(target) else blank
        if name == "setitem":
            return self._with_item(before, args[1], args[2])
        if name in ("copy", "fill", "zero"):
            new = self._lookup(args[1]) if len(args) > 1 else None
            return blank if new is None else new.expand(shape)
        if name in _PLACED:
            try:
                return sh.shrink(getattr(before, name)(*self._mapped(args[1:]), **self._mapped(dict(kwargs))))
            except (RuntimeError, TypeError, IndexError, AttributeError) as error:
                raise UnknownError(f"{name} writes into it") from error
        if name in FOLLOWED:
            raise UnknownError(f"{name} changes it in place")
        others = self._filled([value for value in inputs if value is not target])
        shadows = [before, *(self._shadow(value) for value in others)]
        return carry(Operation(name, args, kwargs, self._lookup, shadows, shape), self.entries)

    def _with_item(self, before: Tensor, index: Any, value: Any) -> Tensor:
        """`before` with `value` written at `index`; channels that are written in part count as written."""
        index, new = self._mapped(index), self._lookup(value)
        given = index if isinstance(index, tuple) else (index,)
        axes = sum(item is not None and item is not Ellipsis for item in given)
        some = any(isinstance(item, Tensor) and item.dtype == torch.bool for item in given)
        written = sh.blank((), self.entries.blank) if new is None else new
        reaches = Ellipsis in [item for item in given if not isinstance(item, Tensor)] or axes == before.dim()
        base = sh.one_channel(before)
        last = given[-1]
        if not reaches or last is Ellipsis:
            written = sh.one_channel(written)
        elif isinstance(last, (slice, int)) and not some:
            if new is None and last != slice(None):
                return before  # some of the channels
            written = sh.one_channel(written) if isinstance(last, slice) else written
            given = (*given[:-1], slice(None) if isinstance(last, slice) else 0)
        else:
            raise UnknownError("it is written at computed channels")
        if all(item is Ellipsis or (isinstance(item, slice) and item == slice(None)) for item in given):
            return written.expand(before.shape)  # all tokens: nothing is left of what was there
        base = base.clone()
        base[given] = written
        return sh.shrink(base).expand(before.shape)

    def _note_view(
        self, value: Any, name: str, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any
    ) -> None:
        base, outs = args[0], self._tensors(out)
        at = next(at for at, other in enumerate(outs) if other is value)
        shapes = [tuple(self.shape(other) or ()) for other in outs]

        def of(shadow: Tensor) -> Tensor:
            stands_in = RowTracker({}, _STANDS, self.entries)
            stand, results = _Stand(tuple(shadow.shape)), [_Stand(shape) for shape in shapes]
            stands_in.table[stand] = Rows(shadow)
            rows = stands_in._read(name, function, (stand, *args[1:]), kwargs, results, [stand])[results[at]]
            if rows.shadow is None:
                raise UnknownError(rows.reason)
            return rows.shadow

        self._views[value] = (base, of)

    def _store(self, target: Any, rows: Rows) -> None:
        """Let a value that is written into have other rows, and with it what it is a view of, and what is a view."""
        root, path = target, []
        while root in self._views:
            root, of = self._views[root]
            path.append(of)
        if path and rows.shadow is not None:
            rows = self._written_through(root, path[::-1], rows.shadow)
        elif path:
            rows = self._lost(rows.reason, root, [root])
        self.table[target] = self.table[root] = rows
        stale = [value for value in list(self._views) if self._is_known(value)]
        for value in stale:
            self.table[value] = self._derived(value, root) or self.table[value]

    def _written_through(self, root: Any, path: Sequence[Callable[[Tensor], Tensor]], new: Tensor) -> Rows:
        try:
            base = view = self._shadow(root).contiguous().clone()
            for of in path:
                view = of(view)
        except (UnknownError, KeyError) as error:
            return self._lost(str(error), root, [root])
        if not share_memory(view, base):
            return self._lost("a view of it is written into", root, [root])
        view.copy_(new)
        return Rows(sh.shrink(base))

    def _derived(self, value: Any, root: Any) -> Rows | None:
        """The rows of a view of `root`; None if it is a view of something else."""
        if value is root:
            return self.table[root]
        if value not in self._views:
            return None
        base, of = self._views[value]
        rows = self._derived(base, root)
        if rows is None or rows.shadow is None:
            return rows
        try:
            return Rows(of(rows.shadow))
        except UnknownError as error:
            return Rows(None, str(error))


class _Stand:
    """A value of a shape, where the value itself need not be kept."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    @staticmethod
    def shape_of(value: Any) -> Sequence[int] | None:
        """As :class:`Values` wants it."""
        return value.shape if isinstance(value, _Stand) else None


_STANDS = Values(
    _Stand.shape_of, lambda value: None, lambda value: True, lambda value, other: False, lambda value: None
)


def _itself(shadow: Tensor) -> Tensor:
    return shadow


def values_of_tensors() -> Values:
    """How tensors are read."""
    return Values(
        lambda value: tuple(int(size) for size in value.shape) if isinstance(value, Tensor) else None,
        lambda value: None if is_fake(value) or value.device.type == "meta" else value.detach().cpu(),
        lambda value: value.is_floating_point() or value.is_complex(),
        share_memory,
        _stand_in,
    )


def _stand_in(value: Any) -> Tensor | None:
    """The tensor itself, where it is real."""
    if not isinstance(value, Tensor):
        return None
    return like(value, value.shape) if is_fake(value) or value.device.type == "meta" else value


def of_tensors(table: MutableMapping[Any, Rows]) -> RowTracker:
    """Follows the rows of tensors."""
    return RowTracker(table, values_of_tensors())
