"""What operations read, and what the shadows of their results are: followed on the shadows, or computed in place.

Shadows are explained in shadows.py; writes into memory are in rows.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from salad_compile.common.torch_calls import argument_of
from salad_compile.position import shadows as sh
from salad_compile.position.kept_rows import Entries, Operation, carry
from salad_compile.position.operations import LIKE_ANOTHER, MOVES
from salad_compile.position.shadows import UnknownError

_ELEMENTS = (
    "contiguous clone to float double half bfloat16 type type_as to_copy alias detach lift_fresh resolve_conj "
    "resolve_neg convert_element_type cfloat real imag where masked_fill copy"
)
_COMPUTED = frozenset(_ELEMENTS.split())
"""Moves of position/operations.py that compute each element where it is."""
_ALSO_MOVES = "unfold rot90 fliplr flipud take broadcast_to pixel_shuffle pixel_unshuffle channel_shuffle narrow_copy"
FOLLOWED = (MOVES | set(_ALSO_MOVES.split())) - _COMPUTED - {"as_strided"}
_JOINS = {"cat": 0, "concat": 0, "concatenate": 0, "stack": 0, "hstack": 1, "vstack": 0, "dstack": 2}
_RESHAPES = frozenset({"view", "unsafe_view", "reshape", "view_as", "reshape_as", "flatten", "unflatten"})


@dataclass(frozen=True)
class Rows:
    """The shadow of a value, or why there is none."""

    shadow: Tensor | None
    reason: str = ""


@dataclass(frozen=True)
class Values:
    """How a tracker reads the values that it follows: tensors, or the nodes of a graph.

    Attributes:
        shape: of a value that is a tensor, as plain integers; None for anything else.
        constant: a value that derives from no source, as a tensor on the CPU; None where it is not known.
        is_data: whether it holds numbers of the model, and no indices or mask.
        share: whether two of them lie in the same memory.
        stand_in: a real tensor like it; None where there is none.
    """

    shape: Callable[[Any], Sequence[int] | None]
    constant: Callable[[Any], Tensor | None]
    is_data: Callable[[Any], bool]
    share: Callable[[Any, Any], bool]
    stand_in: Callable[[Any], Tensor | None]


class RowReader:
    """Knows the rows of values, and what operations make of them.

    Args:
        table: value -> its rows. values: how to read them. entries: how entries of shadows are combined.
    """

    def __init__(self, table: MutableMapping[Any, Rows], values: Values, entries: Entries | None = None) -> None:
        self.table = table
        self.values, self.shape = values, values.shape
        self.entries = entries or Entries()

    def _is_known(self, value: Any) -> bool:
        return self.shape(value) is not None and value in self.table

    def _tensors(self, out: Any) -> list[Any]:
        parts = out if isinstance(out, (tuple, list)) else [out]
        return [part for part in parts if self.shape(part) is not None]

    def _shadow(self, value: Any) -> Tensor:
        known = self.table[value]
        if known.shadow is None:
            raise UnknownError(known.reason)
        if tuple(known.shadow.shape) != tuple(self.shape(value) or ()):
            raise UnknownError("its shape was changed in place")
        return known.shadow

    def _lookup(self, value: Any) -> Tensor | None:
        return self._shadow(value) if self._is_known(value) and self._filled([value]) else None

    def _filled(self, values: Sequence[Any]) -> list[Any]:
        """Those of which something derives from a source."""
        shadows = [self.table[value].shadow for value in values]
        blank = [shadow is not None and self._is_blank(sh.compact(shadow)) for shadow in shadows]
        return [value for value, nothing in zip(values, blank, strict=True) if not nothing]

    def _is_blank(self, entries: Tensor) -> bool:
        return entries.numel() == 1 and int(entries) == self.entries.blank

    def _blank(self, outs: Sequence[Any]) -> dict[Any, Rows]:
        return {value: Rows(sh.blank(self.shape(value) or (), self.entries.blank)) for value in outs}

    def _read(
        self,
        name: str,
        function: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        outs: Sequence[Any],
        inputs: Sequence[Any],
    ) -> dict[Any, Rows]:
        """The rows of what an operation returns."""
        if name not in FOLLOWED or _reinterprets(name, args):
            return {value: self._carried(name, function, args, kwargs, value, inputs) for value in outs}
        try:
            moved = self._move(name, function, args, kwargs, outs)
        except UnknownError as error:
            return {value: self._lost(str(error), value, inputs) for value in outs}
        parts = [moved] if isinstance(moved, Tensor) else list(moved)
        if [tuple(part.shape) for part in parts] != [tuple(self.shape(value) or ()) for value in outs]:
            reason = f"{name} has a result of another shape than expected"
            return {value: self._lost(reason, value, inputs) for value in outs}
        return {value: Rows(part) for value, part in zip(outs, parts, strict=True)}

    def _lost(self, reason: str, value: Any, inputs: Sequence[Any]) -> Rows:
        """The rows of a value that comes from `inputs` in a way that cannot be followed."""
        return Rows(None, reason)

    def _carried(
        self,
        name: str,
        function: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        value: Any,
        inputs: Sequence[Any],
    ) -> Rows:
        """The rows of a value that is computed from others."""
        shape = self.shape(value) or ()
        if getattr(function, "__name__", function) == "__rmatmul__":
            name, args = "matmul", args[::-1]
        if name in LIKE_ANOTHER or name in ("where", "masked_fill"):  # the others lend a dtype, or choose
            given = args[1:3] if name == "where" else args[:1]
            inputs = [value for value in given if any(value is other for other in inputs)]
        if not inputs:
            return Rows(sh.blank(shape, self.entries.blank))
        try:
            shadows = [self._shadow(value) for value in inputs]
            return Rows(carry(Operation(name, args, kwargs, self._lookup, shadows, shape), self.entries))
        except UnknownError as error:
            return self._lost(str(error), value, inputs)

    def _move(
        self, name: str, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], outs: Sequence[Any]
    ) -> Any:
        """Run on the shadows what moves the values."""
        if name in ("view_as_complex", "view_as_real"):
            shadow = self._shadow(args[0])
            return shadow[..., 0] if name == "view_as_complex" else shadow.unsqueeze(-1).expand(*shadow.shape, 2)
        if name in _JOINS:
            return self._joined(name, args, kwargs)
        first = next(value for value in leaves((args, kwargs)) if self._is_known(value))
        if name in _RESHAPES:
            return sh.reshape(self._shadow(first), self.shape(outs[0]) or ())
        if name == "expand_as":
            return self._shadow(first).expand(tuple(self.shape(outs[0]) or ()))
        if name in ("pad", "constant_pad_nd"):
            return self._padded(args, kwargs)
        if name == "getitem" and _only_slices(args[1]) and self._shadow(args[0]).shape == self.shape(outs[0]):
            return self._shadow(args[0])  # whatever the bounds are, nothing is cut off
        args, kwargs = self._mapped(args), self._mapped(kwargs)
        try:
            if function is getattr:
                return getattr(*args)
            moved = (
                getattr(args[0], function)(*args[1:], **kwargs)
                if isinstance(function, str)
                else function(*args, **kwargs)
            )
        except (RuntimeError, TypeError, IndexError, NotImplementedError) as error:
            raise UnknownError(f"{name} cannot be followed") from error
        one = moved if isinstance(moved, Tensor) else moved[0]
        return moved if sh.share_memory(one, self._shadow(first)) else _expand_all(moved)

    def _joined(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        parts: list[Tensor] = self._mapped(list(args[0] if args else kwargs["tensors"]))
        if name in ("vstack", "dstack"):
            parts = list((torch.atleast_2d if name == "vstack" else torch.atleast_3d)(parts))  # type: ignore[no-untyped-call]
        dim = argument_of(args, kwargs, 1, "dim", _JOINS[name])
        dim = 0 if name == "hstack" and parts[0].dim() == 1 else dim
        return sh.stack(parts, dim) if name == "stack" else sh.cat(parts, dim)

    def _padded(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        given = argument_of(args, kwargs, 1, "pad", ())
        mode = kwargs.get("mode", args[2] if len(args) > 2 and isinstance(args[2], str) else "constant")
        if mode != "constant":
            raise UnknownError(f"it is padded in mode {mode!r}")
        shadow, pad = self._shadow(args[0] if args else kwargs["input"]), [int(size) for size in given]
        if any(pad[:2]) or shadow.stride(-1) != 0:
            return sh.shrink(F.pad(shadow, pad, value=self.entries.blank))
        padded = F.pad(shadow[..., :1], pad, value=self.entries.blank)
        return padded.expand(*padded.shape[:-1], shadow.shape[-1])

    def _mapped(self, tree: Any) -> Any:
        """Arguments with shadows for values, and what else is a tensor as it is."""
        if isinstance(tree, (tuple, list)):  # of graphs, some are lists of a kind of their own
            return (list if isinstance(tree, list) else tuple)(self._mapped(item) for item in tree)
        if isinstance(tree, dict):
            return {key: self._mapped(item) for key, item in tree.items()}
        if isinstance(tree, slice):
            return slice(*(self._mapped(edge) for edge in (tree.start, tree.stop, tree.step)))
        shape = self.shape(tree)
        if shape is None:
            return tree
        if self._is_known(tree) and (self.values.is_data(tree) or self._filled([tree])):
            if not self.values.is_data(tree):
                raise UnknownError("an index is computed from the tokens")
            return self._shadow(tree)
        if self.values.is_data(tree):
            return sh.blank(shape, self.entries.blank)
        value = self.values.constant(tree)
        if value is None:
            raise UnknownError("an index is known at run time only")
        return value


def _expand_all(moved: Any) -> Any:
    if isinstance(moved, Tensor):
        return sh.shrink(moved)
    return [sh.shrink(part) for part in moved]


def _only_slices(index: Any) -> bool:
    return all(
        isinstance(item, slice) or item is Ellipsis for item in (index if isinstance(index, tuple) else (index,))
    )


def _reinterprets(name: str, args: Sequence[Any]) -> bool:
    """Whether this is `view(dtype)`."""
    return name == "view" and len(args) > 1 and isinstance(args[1], torch.dtype)


def leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, (tuple, list)):
        for item in tree:
            yield from leaves(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from leaves(item)
    elif isinstance(tree, slice):
        yield from leaves((tree.start, tree.stop, tree.step))
    elif tree is not None and not isinstance(tree, (int, float, bool, str, torch.dtype, torch.device)):
        yield tree
