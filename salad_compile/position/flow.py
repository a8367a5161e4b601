"""Follows projected queries and keys through the operations of a forward, up to where position mixes in.

Operations are nodes of an `fx.Graph`, added in the order in which they run: those of a graph that Dynamo or
torch.export made (passes/replay_position.py), or those that the eager twin has seen (position/recording.py). Such
graphs are not functional. So what is followed are cells: a node's value as it was made, or as it is after a write into
its memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, statically_known_true

from salad_compile.position.operations import BLANKS, MOVES, PLACING, PROJECTIONS, data_arguments, is_opaque, operation


class Cell(NamedTuple):
    """The value of a node: as it was made, or as it is read after a node that wrote into its memory."""

    node: fx.Node
    after: fx.Node | None = None


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor. storage: a number that only tensors of one memory share."""

    shape: tuple[Any, ...]
    dtype: torch.dtype
    storage: int
    parameter: bool

    @classmethod
    def of(cls, value: object) -> TensorInfo | None:
        """None if the value is not a tensor."""
        if not isinstance(value, Tensor):
            return None
        try:
            # private: the address of the memory's object, which views share. Seen in torch 2.11 and 2.13;
            # tests/salad_compile/position/test_private_names.py fails when it moves.
            storage = value.untyped_storage()._cdata
        except (RuntimeError, NotImplementedError):  # sparse, or inside vmap: on no way to attention
            return None
        return cls(tuple(value.shape), value.dtype, storage, isinstance(value, nn.Parameter))


class _Region(NamedTuple):
    """A part of a memory. path: which pieces of which splits lead to it."""

    storage: int
    path: tuple[tuple[fx.Node, object], ...]

    def meets(self, other: _Region) -> bool:
        """Whether the two may overlap: unless they are, or lie in, different pieces of one split."""
        for (split, piece), (other_split, other_piece) in zip(self.path, other.path, strict=False):
            if split is not other_split:
                return True
            if piece != other_piece:
                return False
        return True


class Flow:
    """Which values derive from the projections of one attention module, and into which of them position has mixed.

    Position is a tensor that derives from no projection and differs between tokens: cosines, frequencies, rotation
    matrices. The weights of a norm do not.

    Args:
        info: what is known of a node's tensor; None for what is no tensor.
        is_barrier: whether what a node answers is no longer the projected value: attention.

    Attributes:
        parents: derived cell -> the derived cells it was computed from, in the order of execution.
        mixed: the derived cells that hold position. joins: those in which it was added.
        placed: the derived cells in which values of another origin have got rows of their own.
        order: node -> its number in the order of execution.
    """

    def __init__(self, info: Callable[[fx.Node], TensorInfo | None], is_barrier: Callable[[fx.Node], bool]) -> None:
        self.info = info
        self.is_barrier = is_barrier
        self.parents: dict[Cell, tuple[Cell, ...]] = {}
        self.mixed: set[Cell] = set()
        self.joins: set[Cell] = set()
        self.placed: set[Cell] = set()
        self.order: dict[fx.Node, int] = {}
        self._batches: list[Any] = []
        self._token_counts: list[Any] = []
        self._blank_storages: set[int] = set()
        self._regions: dict[fx.Node, _Region] = {}
        self._split_of: dict[fx.Node, fx.Node] = {}  # a node that answers several views -> whose they are
        self._bases: dict[fx.Node, fx.Node] = {}  # a view -> the argument that it is a view of
        self._roots: dict[int, fx.Node] = {}
        self._writes: dict[int, list[tuple[_Region, fx.Node]]] = {}
        self._born: dict[fx.Node, int] = {}  # how many writes its memory had seen
        self._parametric: dict[fx.Node, bool] = {}
        self._inputs: set[fx.Node] = set()  # of the projections

    def add_input(self, node: fx.Node) -> None:
        """The input of a projection: what other projections make of it is no position, but an adapter's update."""
        self._inputs.add(node)

    def add_source(self, node: fx.Node) -> None:
        """The output of a projection, (..., tokens, channels)."""
        self.order[node] = len(self.order)
        self.parents[Cell(node)] = ()
        self._place(node, fresh=True)
        shape = self._shape(node)
        if len(shape) > 1:
            self._token_counts.append(shape[-2])
        if len(shape) > 2:
            self._batches.append(shape[0])

    def add(self, node: fx.Node) -> None:
        """The next operation."""
        self.order[node] = len(self.order)
        name, targets = operation(node)
        if name in BLANKS and not targets:
            self._place(node, fresh=True)
            if node in self._regions:
                self._blank_storages.add(self._regions[node].storage)
            return
        derived, others = self._arguments(node, name)
        if not derived and any(other in self._inputs for other in others):
            if name in PROJECTIONS:
                self.add_source(node)
                return
            if name in MOVES or name == "dropout":
                self._inputs.add(node)
        if not derived or self.is_barrier(node):
            self._note_other_write(node, targets)
            self._place(node)
            return
        cell = Cell(node)
        self.parents[cell] = tuple(derived)
        if others and name in PLACING:
            self.placed.add(cell)
        if self._joins(node, others, derived):
            self.joins.add(cell)
        if cell in self.joins or any(parent in self.mixed for parent in derived):
            self.mixed.add(cell)
        for target in targets:
            self._note_write(node, target)
        self._place(node)

    def mixes(self, node: fx.Node) -> bool:
        """Whether a node that was not added yet would hold position."""
        name, _ = operation(node)
        derived, others = self._arguments(node, name)
        return self._joins(node, others, derived) or any(cell in self.mixed for cell in derived)

    def read(self, node: fx.Node) -> Cell:
        """A node's value as it is now; derived if it is in `parents`."""
        region = self._regions.get(node)
        writes = [] if region is None else self._writes.get(region.storage, [])
        return self._read(node, region, len(writes)) if region is not None else Cell(node)

    def writes_since(self, cell: Cell) -> list[fx.Node]:
        """The nodes that wrote into the memory of a cell after it."""
        region = self._regions.get(cell.node)
        if region is None:
            return []
        writes = self._writes.get(region.storage, [])
        start = self._born[cell.node]
        if cell.after is not None:
            start = 1 + next(at for at, (_, node) in enumerate(writes) if node is cell.after)
        return [node for other, node in writes[start:] if other.meets(region)]

    def storage(self, node: fx.Node) -> int | None:
        """The memory of a node's tensor."""
        region = self._regions.get(node)
        return None if region is None else region.storage

    def root(self, storage: int) -> fx.Node:
        """The node that made a memory."""
        return self._roots[storage]

    def base(self, node: fx.Node) -> fx.Node | None:
        """What a node is a view of, or a tuple of views."""
        return self._bases.get(node, self._split_of.get(node))

    def views(self, root: fx.Node, node: fx.Node) -> list[fx.Node]:
        """The nodes that make a view of `root`, in order, without `root`."""
        chain: list[fx.Node] = []
        current: fx.Node | None = node
        while current is not root:
            assert current is not None
            chain.append(current)
            current = self.base(current)
        return chain[::-1]

    def is_blank(self, node: fx.Node) -> bool:
        """Whether a node is a part of memory that was made without data in it."""
        return self.storage(node) in self._blank_storages

    # ------------------------------------------------------------------------------------------------ one operation

    def _arguments(self, node: fx.Node, name: str) -> tuple[list[Cell], list[fx.Node]]:
        """The derived cells among a node's arguments, and the other tensors, without what holds nothing."""
        derived, others = [], []
        for argument in data_arguments(node, name):
            cell = self.read(argument)
            if cell in self.parents:
                derived.append(cell)
            elif self.info(argument) is not None and not self.is_blank(argument):
                others.append(argument)
        return derived, others

    def _joins(self, node: fx.Node, others: Iterable[fx.Node], derived: Iterable[Cell]) -> bool:
        if is_opaque(node.target):
            return True
        name, _ = operation(node)
        if name in PLACING or name in PROJECTIONS:
            return False
        rank = max((len(self._shape(cell.node)) for cell in derived), default=0)
        return any(self._differs_between_tokens(other, rank) for other in others)

    def _differs_between_tokens(self, node: fx.Node, rank: int) -> bool:
        """By its shape: the last axis is channels, and the first of as many as the value has may be samples."""
        info = self.info(node)
        assert info is not None
        shape = info.shape
        if self._is_parametric(node):  # a table of one row per token may be a parameter, too
            return any(same_size(size, count) for size in shape[:-1] for count in self._token_counts)
        if all(same_size(size, 1) for size in shape[:-1]):  # unless the value has its tokens last
            return bool(shape) and any(same_size(shape[-1], count) for count in self._token_counts)
        if len(shape) > 2 and len(shape) >= rank and any(same_size(shape[0], batch) for batch in self._batches):
            shape = shape[1:]
        return any(not same_size(size, 1) for size in shape[:-1])

    def _is_parametric(self, node: fx.Node) -> bool:
        """Whether a value is a parameter, or computed from parameters alone."""
        todo, seen = [node], {node}
        for current in todo:
            known = self._parametric.get(current)
            if known is None and not current.all_input_nodes:
                info = self.info(current)
                known = info is None or info.parameter
                self._parametric[current] = known
            if known is False:
                self._parametric[node] = False
                return False
            if known is None:
                data = data_arguments(current, operation(current)[0])
                fresh = [parent for parent in data if parent not in seen]
                seen.update(fresh)
                todo.extend(fresh)
        self._parametric[node] = True
        return True

    # ------------------------------------------------------------------------------------------------------ memory

    def _place(self, node: fx.Node, *, fresh: bool = False) -> None:
        """Note in which memory a node's tensor lies."""
        info = self.info(node)
        if info is None:
            if node.all_input_nodes:
                self._split_of[node] = node.all_input_nodes[0]
            return
        path = None if fresh else self._path(node, info.storage)
        if path is None:
            path = ()
            self._roots[info.storage] = node
        self._regions[node] = _Region(info.storage, path)
        self._born[node] = len(self._writes.get(info.storage, []))

    def _path(self, node: fx.Node, storage: int) -> tuple[tuple[fx.Node, object], ...] | None:
        """Of a view; None if the node's memory is its own."""
        for argument in node.all_input_nodes:
            base = self._split_of.get(argument, argument)
            region = self._regions.get(base)
            if region is not None and region.storage == storage:
                self._bases[node] = argument
                piece = () if base is argument or len(node.args) < 2 else ((argument, node.args[1]),)
                return (*region.path, *piece)
        return None

    def _read(self, node: fx.Node, region: _Region, end: int) -> Cell:
        """As it is after the first `end` writes into its memory."""
        writes = self._writes.get(region.storage, [])
        for at in range(end - 1, self._born[node] - 1, -1):
            written, writer = writes[at]
            if not written.meets(region):
                continue
            cell = Cell(node, writer)
            if cell not in self.parents:
                before = []
                if len(written.path) > len(region.path):  # of a part: the rest is as it was
                    before = [other for other in (self._read(node, region, at),) if other in self.parents]
                self.parents[cell] = (Cell(writer), *before)
                if any(parent in self.mixed for parent in self.parents[cell]):
                    self.mixed.add(cell)
            return cell
        return Cell(node)

    def _note_write(self, node: fx.Node, target: fx.Node) -> None:
        region = self._regions.get(target)
        if region is not None:
            self._writes.setdefault(region.storage, []).append((region, node))

    def _note_other_write(self, node: fx.Node, targets: Iterable[fx.Node]) -> None:
        """Nothing that derives from a projection is written, and into nothing that does."""
        regions = [self._regions[target] for target in targets if target in self._regions]
        if any(self.info(argument) is not None for argument in node.all_input_nodes[1:]):
            self._blank_storages.difference_update(region.storage for region in regions)

    def _shape(self, node: fx.Node) -> tuple[Any, ...]:
        info = self.info(node)
        return () if info is None else info.shape


def same_size(one: Any, other: Any) -> bool:
    """Without adding a guard on a symbolic size."""
    return (
        bool(one == other) if isinstance(one, int) and isinstance(other, int) else statically_known_true(one == other)
    )


def may_be_same_size(one: Any, other: Any) -> bool:
    """Of sizes that only the run knows: whether nothing speaks against it."""
    if same_size(one, other):
        return True
    unknown = any(not isinstance(size, int) and free_unbacked_symbols(size) for size in (one, other))
    return bool(unknown) and not statically_known_true(one != other)
