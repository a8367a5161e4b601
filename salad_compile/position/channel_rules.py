"""What a position encoding makes of each channel, read off its own operations, whatever they are called.

The operations are run on forms (channel_forms.py) in the place of numbers. So a rotation is recognised by what it
computes: of neighbours or halves, by complex numbers or matrices, written in place or stacked. What is not understood
raises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import fx

from salad_compile.common.torch_calls import argument_of
from salad_compile.position.channel_forms import (
    ENTRY,
    FACTOR_ONE,
    NOTHING,
    SIGN,
    SOURCE,
    TABLE,
    UNWRITTEN,
    Form,
    Table,
    UnknownFormError,
    axes_after,
    channel_sizes,
    index_of,
    is_same,
)
from salad_compile.position.operations import BLANKS, operation

_CASTS_AND_COPIES = (
    "contiguous clone to float double half bfloat16 type type_as to_copy alias detach convert_element_type lift_fresh "
    "resolve_conj resolve_neg"
)
_SHAPES = "view reshape flatten unflatten squeeze unsqueeze view_as reshape_as unsafe_view"
SAME = frozenset(_CASTS_AND_COPIES.split())
RESHAPES = frozenset(_SHAPES.split())
AXIS_MOVES = frozenset({"transpose", "swapaxes", "swapdims", "permute"})


@dataclass
class Interpreter:
    """Runs nodes on forms.

    Attributes:
        value: a node's recorded value.
        known: node -> its form, or several.
        tables: what forms were multiplied with so far.
        dtype: of what all begins with: nothing on the way may be narrower.
    """

    value: Callable[[fx.Node], Any]
    known: dict[fx.Node, Any]
    dtype: torch.dtype
    tables: list[Table] = field(default_factory=list)

    def run(self, nodes: Sequence[fx.Node]) -> None:
        """Each node in order. Raises UnknownFormError."""
        for node in nodes:
            name, written = operation(node)
            if written:
                self._write(node, name)
            elif name in BLANKS:
                self.known[node] = self._blank(node)
            else:
                self.known[node] = self._apply(node, name)
                self._require_precision(node, name)

    def _apply(self, node: fx.Node, name: str) -> Any:
        if name in SAME:
            form = self.form(node.args[0])
            if self.recorded(node).is_complex() != form.is_complex:
                raise UnknownFormError(f"{name} makes it complex")
            return form
        if name in RESHAPES:
            form, shape = self.form(node.args[0]), tuple(self.recorded(node).shape)
            axes = axes_after(form, shape)
            parts = (2,) if form.is_complex else ()
            sizes = channel_sizes(axes, shape)
            return Form(axes, shape, form.terms.reshape(*sizes, *parts, 2, 4), form.is_complex)
        rule = _RULES.get(name)
        if rule is None:
            raise UnknownFormError(f"it is not known what {name} does to its channels")
        return rule(self, node)

    def _require_precision(self, node: fx.Node, name: str) -> None:
        value = self.value(node)
        for part in value if isinstance(value, (tuple, list)) else [value]:
            if isinstance(part, torch.Tensor):
                real = part.dtype.to_real()
                if real != self.dtype and real.itemsize <= self.dtype.itemsize:
                    raise UnknownFormError(f"{name} rounds it to {part.dtype}")

    def form(self, argument: Any) -> Form:
        """Of an argument. Raises UnknownFormError."""
        form = self.known.get(argument) if isinstance(argument, fx.Node) else None
        if not isinstance(form, Form):
            raise UnknownFormError("something else than its channels goes into it")
        return form

    def recorded(self, node: fx.Node) -> torch.Tensor:
        """The tensor that was recorded for a node. Raises UnknownFormError."""
        value = self.value(node)
        if not isinstance(value, torch.Tensor):
            raise UnknownFormError(f"{node} has no recorded tensor")
        return value

    def _blank(self, node: fx.Node) -> Form:
        """Fresh memory: its dimensions are those of the known value that lends it its shape."""
        shape = tuple(self.recorded(node).shape)
        lent = [self.known[argument] for argument in node.all_input_nodes if isinstance(self.known.get(argument), Form)]
        fits = [form for form in lent if len(form.shape) == len(shape) and all(map(is_same, form.shape, shape))]
        if not fits or self.recorded(node).is_complex() or "zeros" in operation(node)[0]:
            raise UnknownFormError("it is written into memory of another shape")
        self._require_precision(node, "memory of another dtype")
        terms = np.full((*channel_sizes(fits[0].axes, shape), 2, 4), NOTHING, dtype=np.int64)
        terms[..., 0, SOURCE] = UNWRITTEN
        return Form(fits[0].axes, shape, terms)

    def _write(self, node: fx.Node, name: str) -> None:
        target = node.args[0]
        if name != "setitem" or not isinstance(target, fx.Node) or operation(target)[0] not in BLANKS:
            raise UnknownFormError(f"{name} writes into a value that is also read")
        form, value = self.form(target), self.form(node.args[2])
        # views that were taken before stay unwritten, and are refused in the end
        written = Form(form.axes, form.shape, form.terms.copy())
        part = index_of(written, node.args[1])
        if part.axes != value.axes or not all(map(is_same, part.shape, value.shape)):
            raise UnknownFormError("setitem repeats what it writes")
        part.terms[...] = value.terms
        self.known[target] = written

    # ------------------------------------------------------------------------------------------------------ arithmetic

    def times(self, form: Form, factor: Any, node: fx.Node) -> Form:
        """A form times a number or a table."""
        if not isinstance(factor, fx.Node):
            if factor not in (1, -1):
                raise UnknownFormError(f"it is multiplied by {factor}")
            return form if factor == 1 else negated(form)
        if factor in self.known:
            raise UnknownFormError("it is multiplied by itself")
        table, entries = self._table(factor, form)
        shape = tuple(self.recorded(node).shape)
        if len(shape) != len(form.shape):
            raise UnknownFormError("a table has more dimensions than it")
        sizes = channel_sizes(form.axes, shape)
        if table.is_complex:
            if not form.is_complex:
                raise UnknownFormError("it becomes complex by a product")
            real, imaginary = (form.terms[..., part : part + 1, :, :] for part in (0, 1))
            parts = [entries[..., 0:1], entries[..., 1:2]]
            of = self._numbered(table)
            terms = np.concatenate(
                [
                    _joined(_scaled(real, of, parts[0], sizes), _flipped(_scaled(imaginary, of, parts[1], sizes))),
                    _joined(_scaled(real, of, parts[1], sizes), _scaled(imaginary, of, parts[0], sizes)),
                ],
                axis=-3,
            )
            return Form(form.axes, shape, terms, True)
        entries = entries[..., None] if form.is_complex else entries
        terms = _scaled(form.terms, self._numbered(table), entries, (*sizes, 2) if form.is_complex else sizes)
        return Form(form.axes, shape, terms, form.is_complex)

    def _numbered(self, table: Table) -> int:
        if table not in self.tables:
            self.tables.append(table)
        return self.tables.index(table)

    def _table(self, node: fx.Node, form: Form) -> tuple[Table, np.ndarray[Any, Any]]:
        """A table, and the number of each of its entries, lined up with the dimensions of a form."""
        value = self.recorded(node)
        shape, missing = tuple(value.shape), len(form.axes) - value.dim()
        if missing < 0 or not (value.is_floating_point() or value.is_complex()):
            raise UnknownFormError("it is multiplied by something that is no table")
        axes = form.axes[missing:]
        sizes = channel_sizes(axes, shape)
        parts = (2,) if value.is_complex() else ()
        entries = np.arange(int(np.prod((*sizes, *parts)))).reshape(*(1,) * missing, *sizes, *parts)
        return Table(node, axes, sizes, value.is_complex()), entries

    def added(self, one: Form, other: Form) -> Form:
        """The sum of two forms of one shape."""
        alike = one.axes == other.axes and one.is_complex == other.is_complex
        if not alike or one.terms.shape != other.terms.shape:
            raise UnknownFormError("values of different shapes are added")
        return Form(one.axes, one.shape, _joined(one.terms, other.terms), one.is_complex)


def negated(form: Form) -> Form:
    """A form times -1."""
    return Form(form.axes, form.shape, _flipped(form.terms), form.is_complex)


def _flipped(terms: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    terms = terms.copy()
    terms[..., SIGN] *= -1
    return terms


def _scaled(
    terms: np.ndarray[Any, Any], table: int, entries: np.ndarray[Any, Any], sizes: tuple[int, ...]
) -> np.ndarray[Any, Any]:
    if entries.ndim > len(sizes):  # a part of complex numbers
        sizes = (*sizes, 1)
    terms = np.broadcast_to(terms, (*sizes, 2, 4)).copy()
    there = terms[..., SOURCE] >= 0
    if (terms[..., TABLE][there] != FACTOR_ONE).any() or (terms[..., SOURCE] == UNWRITTEN).any():
        raise UnknownFormError("it is multiplied by a second table")
    terms[..., TABLE] = np.where(there, table, terms[..., TABLE])
    terms[..., ENTRY] = np.where(there, np.broadcast_to(entries, sizes)[..., None], terms[..., ENTRY])
    return terms


def _joined(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The terms of a sum, which may be two."""
    terms = np.concatenate([one, other], axis=-2)
    order = np.argsort(terms[..., SOURCE] == NOTHING, axis=-1, kind="stable")
    terms = np.take_along_axis(terms, order[..., None], axis=-2)
    if (terms[..., 2:, SOURCE] != NOTHING).any() or (terms[..., SOURCE] == UNWRITTEN).any():
        raise UnknownFormError("a sum has more than two terms")
    return terms[..., :2, :]


# --------------------------------------------------------------------------------------------------------------- rules


def _argument(node: fx.Node, at: int, name: str, default: Any = None) -> Any:
    return argument_of(node.args, node.kwargs, at, name, default)


def _channel_axis(form: Form, given: Any, added: int = 0) -> int:
    """A dimension of channels, counted from the front."""
    if not isinstance(given, int) or form.is_complex:
        raise UnknownFormError("it is cut or joined along something that is no dimension of channels")
    axis: int = given % (len(form.axes) + added)
    if not added and form.axes[axis] is not None:
        raise UnknownFormError("its tokens or samples are cut or joined")
    return axis


def _mul(run: Interpreter, node: fx.Node) -> Form:
    one, two = _argument(node, 0, "input"), _argument(node, 1, "other")
    return run.times(run.form(one), two, node) if one in run.known else run.times(run.form(two), one, node)


def _add(run: Interpreter, node: fx.Node, sign: int = 1) -> Form:
    if _argument(node, 2, "alpha", 1) != 1:
        raise UnknownFormError("a sum is weighted")
    other = run.form(_argument(node, 1, "other"))
    return run.added(run.form(_argument(node, 0, "input")), other if sign == 1 else negated(other))


def _addcmul(run: Interpreter, node: fx.Node) -> Form:
    if node.kwargs.get("value", 1) != 1 or len(node.args) != 3:
        raise UnknownFormError("addcmul weights its product")
    start, one, two = node.args
    form, factor = (one, two) if one in run.known else (two, one)
    return run.added(run.form(start), run.times(run.form(form), factor, node))


def _sum(run: Interpreter, node: fx.Node) -> Form:
    form = run.form(node.args[0])
    axis = _argument(node, 1, "dim")
    axis = axis[0] if isinstance(axis, (list, tuple)) and len(axis) == 1 else axis
    axis = _channel_axis(form, axis)
    if _argument(node, 2, "keepdim", False):
        raise UnknownFormError("a sum keeps its dimension")
    parts = [_picked(form, axis, at) for at in range(form.terms.shape[axis])]
    total = parts[0]
    for part in parts[1:]:
        total = run.added(total, part)
    return total


def _picked(form: Form, axis: int, at: int | slice) -> Form:
    return index_of(form, (*(slice(None),) * axis, at))


def _pieces(run: Interpreter, node: fx.Node) -> tuple[Form, ...]:
    form, name = run.form(node.args[0]), operation(node)[0]
    axis = _channel_axis(form, _argument(node, 1 if name == "unbind" else 2, "dim", 0))
    if name == "unbind":
        return tuple(_picked(form, axis, at) for at in range(form.terms.shape[axis]))
    pieces, first = [], 0
    for value in run.value(node):
        last = first + value.shape[axis]
        pieces.append(_picked(form, axis, slice(first, last)))
        first = last
    return tuple(pieces)


def _getitem(run: Interpreter, node: fx.Node) -> Any:
    source: Any = run.known.get(node.args[0])  # type: ignore[arg-type]
    index: Any = node.args[1]
    return source[index] if isinstance(source, tuple) else index_of(run.form(node.args[0]), index)


def _narrow(run: Interpreter, node: fx.Node) -> Form:
    form = run.form(node.args[0])
    axis, start, length = (_argument(node, at, name) for at, name in ((1, "dim"), (2, "start"), (3, "length")))
    return _picked(form, _channel_axis(form, axis), slice(start, start + length))


def _select(run: Interpreter, node: fx.Node) -> Form:
    form = run.form(node.args[0])
    return _picked(form, _channel_axis(form, _argument(node, 1, "dim")), _argument(node, 2, "index"))


def _cat(run: Interpreter, node: fx.Node) -> Form:
    forms = [run.form(tensor) for tensor in _argument(node, 0, "tensors")]
    first = forms[0]
    stacks = operation(node)[0] == "stack"
    axis = _channel_axis(first, _argument(node, 1, "dim", 0), added=int(stacks))
    if any(form.axes != first.axes or form.is_complex for form in forms):
        raise UnknownFormError("values of different shapes are put together")
    axes = (*first.axes[:axis], None, *first.axes[axis:]) if stacks else first.axes
    terms = (np.stack if stacks else np.concatenate)([form.terms for form in forms], axis=axis)
    return Form(axes, tuple(run.recorded(node).shape), terms)


def _permuted(form: Form, order: Sequence[int]) -> Form:
    order = [axis % len(form.axes) for axis in order]
    rest = range(len(order), form.terms.ndim)
    return Form(
        tuple(form.axes[axis] for axis in order),
        tuple(form.shape[axis] for axis in order),
        form.terms.transpose(*order, *rest),
        form.is_complex,
    )


def _repeated(run: Interpreter, node: fx.Node) -> Form:
    """Once each: key heads as many as query heads."""
    form, shape = run.form(node.args[0]), run.recorded(node).shape
    if form.is_complex or len(shape) != len(form.shape) or not all(map(is_same, shape, form.shape)):
        raise UnknownFormError("its heads are repeated")
    return form


def _transpose(run: Interpreter, node: fx.Node) -> Form:
    form = run.form(node.args[0])
    order = list(range(len(form.axes)))
    one, two = (_argument(node, 1, "dim0"), _argument(node, 2, "dim1"))
    order[one], order[two] = order[two], order[one]
    return _permuted(form, order)


def _permute(run: Interpreter, node: fx.Node) -> Form:
    given = node.args[1:] or (node.kwargs["dims"],)
    return _permuted(run.form(node.args[0]), given[0] if isinstance(given[0], (tuple, list)) else given)  # type: ignore[arg-type]


def _movedim(run: Interpreter, node: fx.Node) -> Form:
    form = run.form(node.args[0])
    numbered = np.empty(range(1, len(form.axes) + 1))
    moved = np.moveaxis(numbered, _argument(node, 1, "source"), _argument(node, 2, "destination"))
    return _permuted(form, [size - 1 for size in moved.shape])


def _as_complex(run: Interpreter, node: fx.Node) -> Form:
    form = run.form(node.args[0])
    if form.is_complex or form.axes[-1] is not None or form.shape[-1] != 2:
        raise UnknownFormError("complex numbers are made of something that is no pair of channels")
    return Form(form.axes[:-1], form.shape[:-1], form.terms, True)


def _as_real(run: Interpreter, node: fx.Node) -> Form:
    form = run.form(node.args[0])
    if not form.is_complex:
        raise UnknownFormError("parts are taken of numbers that are not complex")
    return Form((*form.axes, None), (*form.shape, 2), form.terms)


_RULES: dict[str, Callable[[Interpreter, fx.Node], Any]] = {
    "mul": _mul,
    **dict.fromkeys(("add", "iadd"), _add),
    **dict.fromkeys(("sub", "subtract"), lambda run, node: _add(run, node, -1)),
    **dict.fromkeys(("neg", "negative"), lambda run, node: negated(run.form(node.args[0]))),
    "addcmul": _addcmul,
    "sum": _sum,
    **dict.fromkeys(("chunk", "unsafe_chunk", "split", "unsafe_split", "split_with_sizes", "unbind"), _pieces),
    "getitem": _getitem,
    "narrow": _narrow,
    "select": _select,
    **dict.fromkeys(("cat", "concat", "concatenate", "stack"), _cat),
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), _transpose),
    "permute": _permute,
    **dict.fromkeys(("movedim", "moveaxis"), _movedim),
    **dict.fromkeys(("repeat_interleave", "expand", "repeat"), _repeated),
    "view_as_complex": _as_complex,
    "view_as_real": _as_real,
}
