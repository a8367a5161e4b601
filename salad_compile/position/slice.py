"""The part of a forward that applies position to a projected query or key, so that it can be run on another value.

map-then-rotate (specification 5; of SANA-Video, arXiv 2509.24695, and the likelier reading of arXiv 2601.16515)
weighs by R_i phi(q'_i) . R_j phi(k'_j), over phi(q'_i) . sum_j phi(k'_j): q' and k' are the query and the key before
the position encoding R of the model. R is not computed here: the model's own operations are run once more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from salad_compile.errors import PositionReplayError
from salad_compile.kernels.linear.feature_maps import find_feature_map
from salad_compile.position.flow import Cell, Flow, TensorInfo, may_be_same_size
from salad_compile.position.operations import BLANKS, MOVES, is_opaque, is_scaling, nonlinear, operation


class UndeterminedError(Exception):
    """Why the position encoding of one operand was not found; front ends say of which site."""


@dataclass(frozen=True)
class Entry:
    """One stream of an operand: where its value is that position has not mixed into, and where it has.

    Attributes:
        start: the last value without position. end: the first with all of it, of the same shape; of a stream without
            position the same cell.
        overwritten: whether the forward writes into the memory of `start` afterwards. rewritten: whether what is run
            again writes into it, without position and with.
        info: of `start`. head_dim: the width of a head, of which its last axis may hold several.
    """

    start: Cell
    end: Cell
    overwritten: bool
    rewritten: tuple[bool, bool]
    info: TensorInfo
    head_dim: int

    @property
    def at(self) -> fx.Node:
        """The operation with which `start` has its value."""
        return self.start.after or self.start.node

    def begin(self, value: Any, feature_map: str) -> tuple[Any, Any]:
        """A value at `start`, and its features, to be written into where `rewritten` says so."""
        mapped = features(value, self.info, self.head_dim, feature_map)
        # what the map keeps for its backward may be its result
        return value.clone() if self.rewritten[0] else value, mapped.clone() if self.rewritten[1] else mapped


@dataclass(frozen=True)
class PositionSlice:
    """How an operand is made of values without position.

    Attributes:
        entries: its streams. operand: the node.
        plain: nodes between the ends and the operand, in order: moves alone. mapped: those from the starts on.
        scalings: those among them that multiply by a number, which would be squared: they are passed over.
    """

    entries: tuple[Entry, ...]
    operand: fx.Node
    plain: tuple[fx.Node, ...]
    mapped: tuple[fx.Node, ...]
    scalings: frozenset[fx.Node]

    def replay(
        self,
        begin: Callable[[Entry], tuple[Any, Any]],
        again: Callable[[fx.Node, Mapping[fx.Node, Any]], Any],
    ) -> tuple[Any, Any]:
        """The operand without position, and what the model makes of the features.

        Args:
            begin: the value at an entry's start, and its features.
            again: runs a node once more, with other values for some of its arguments.
        """
        values = [begin(entry) for entry in self.entries]
        ends = {entry.end.node: value for entry, (value, _) in zip(self.entries, values, strict=True)}
        starts = {entry.start.node: features for entry, (_, features) in zip(self.entries, values, strict=True)}
        return self._run(self.plain, ends, again), self._run(self.mapped, starts, again)

    def _run(
        self, nodes: Sequence[fx.Node], known: dict[fx.Node, Any], again: Callable[[fx.Node, dict[fx.Node, Any]], Any]
    ) -> Any:
        for node in nodes:
            known[node] = known[passed_over(node)] if node in self.scalings else again(node, known)
        return known[self.operand]


def find_slice(flow: Flow, operand: fx.Node, head_dim: int) -> PositionSlice | None:
    """How an operand of attention got its position; None if position never mixed into it.

    Raises:
        UndeterminedError: it derives from no projection, or its position cannot be told from what else is done to it.
    """
    goal = flow.read(operand)
    if goal not in flow.parents:
        raise UndeterminedError("it derives from no projection of this module")
    return None if goal not in flow.mixed else _Search(flow, goal, head_dim).run()


class _Search:
    """The search for one operand. All cells are those that the operand derives from, in the order of execution."""

    def __init__(self, flow: Flow, goal: Cell, head_dim: int) -> None:
        self.flow, self.goal, self.head_dim = flow, goal, head_dim
        self.number = {cell: at for at, cell in enumerate(flow.parents)}
        self.cells = self._sorted(self._before([goal]))
        self.children: dict[Cell, list[Cell]] = {cell: [] for cell in self.cells}
        for cell in self.cells:
            for parent in flow.parents[cell]:
                self.children[parent].append(cell)

    def run(self) -> PositionSlice:
        for cell in self.cells:
            if cell.after is None and is_opaque(cell.node.target):
                raise UndeterminedError(
                    f"{operation(cell.node)[0]}, on its way to attention, is not known to be linear"
                )
        streams = self._streams()
        entries = [self._entry(frontier) for frontier in streams]
        plain_cells = self._after([entry.end for entry in entries])
        mapped_cells = self._after([entry.start for entry in entries])
        made = [cell.node for cell in plain_cells if cell.after is None]
        scalings = {node for node in made if is_scaling(node, operation(node)[0])}
        self._require_linear(mapped_cells, plain_cells, scalings)
        plain = self._nodes(plain_cells, {entry.end.node for entry in entries})
        mapped = self._nodes(mapped_cells, {entry.start.node for entry in entries})
        entries = [self._with_writes(entry, plain, mapped) for entry in entries]
        return PositionSlice(tuple(entries), self.goal.node, tuple(plain), tuple(mapped), frozenset(scalings))

    # ------------------------------------------------------------------------------------------- where streams begin

    def _streams(self) -> list[list[Cell]]:
        """The last cells without position, those together that derive from the same projections."""
        mixed = self.flow.mixed
        frontier = [
            cell for cell in self.cells if cell not in mixed and any(child in mixed for child in self.children[cell])
        ]
        streams: list[tuple[set[Cell], list[Cell]]] = []
        for cell in frontier:
            sources = {c for c in self._before([cell]) if not self.flow.parents[c]}
            cells = [cell]
            for other in [stream for stream in streams if stream[0] & sources]:
                streams.remove(other)
                sources, cells = sources | other[0], [*other[1], *cells]
            streams.append((sources, cells))
        return [cells for _, cells in streams]

    def _entry(self, frontier: list[Cell]) -> Entry:
        before = self._sorted(self._before(frontier))
        starts = self._dominators(before, frontier)
        beyond = [cell for cell in self._after(frontier) if cell in self.flow.mixed]
        joins = [cell for cell in beyond if cell in self.flow.joins]
        faults = []
        for at in range(len(starts) - 1, -1, -1):
            start = starts[at]
            info = self._usable(start)
            if info is not None:
                end = self._end(start, info, frontier, beyond, joins) if joins else start
                if end is not None:
                    return Entry(start, end, False, (False, False), info, self.head_dim)
                faults.append(f"{start.node} has another shape than what position makes of it")
            first = self.number[starts[at - 1]] if at else -1
            if not all(self._moves(cell) for cell in before if first < self.number[cell] <= self.number[start]):
                break
        raise UndeterminedError(
            faults[0] if faults else "what position mixes into is not one real value with the channels last"
        )

    def _dominators(self, cells: list[Cell], goals: Sequence[Cell]) -> list[Cell]:
        """The cells of a part through which every way to its goals goes, in order."""
        inside, found = set(cells), []
        reach = max(self.number[cell] for cell in cells if not self.flow.parents[cell])  # the last of the sources
        for cell in cells:
            number = self.number[cell]
            if reach <= number:
                found.append(cell)
            ends = [self.number[child] for child in self.children[cell] if child in inside]
            ends += [len(self.number)] if cell in goals else []
            reach = max([reach, *ends])
        return found

    def _usable(self, cell: Cell) -> TensorInfo | None:
        """The info of a real tensor whose last axis is the channels of one or of several heads."""
        info = self.flow.info(cell.node)
        if info is None or not info.dtype.is_floating_point or len(info.shape) < 2 or self._is_read_anew(cell):
            return None
        channels = info.shape[-1]
        return info if isinstance(channels, int) and channels % self.head_dim == 0 else None

    def _end(
        self, start: Cell, info: TensorInfo, frontier: list[Cell], beyond: list[Cell], joins: list[Cell]
    ) -> Cell | None:
        """The first cell after the last join through which all goes on, if it has the shape of the start."""
        last = max(self.number[cell] for cell in joins)
        inside = set(beyond)
        reach = max(self.number[child] for cell in frontier for child in self.children[cell] if child in inside)
        for cell in beyond:
            number = self.number[cell]
            other = self.flow.info(cell.node)
            if number >= max(last, reach) and other is not None and other.dtype.is_floating_point:
                fits = len(other.shape) == len(info.shape) and all(map(may_be_same_size, other.shape, info.shape))
                if fits and not self._is_read_anew(cell):
                    return cell
            reach = max([reach, *(self.number[child] for child in self.children[cell])])
        return None

    def _is_read_anew(self, cell: Cell) -> bool:
        """Whether a cell is a write, and its memory is then read as another node."""
        return cell.after is None and any(child.after is cell.node for child in self.children[cell])

    # ---------------------------------------------------------------------------------------------- what to run again

    def _moves(self, cell: Cell) -> bool:
        return cell.after is not None or operation(cell.node)[0] in MOVES

    def _require_linear(self, mapped: list[Cell], plain: list[Cell], scalings: set[fx.Node]) -> None:
        after_position = set(plain)
        for cell in mapped:
            node = cell.node
            if cell.after is not None or node in scalings:
                continue
            name, _ = operation(node)
            carriers = [n for n in node.all_input_nodes if self._carries(n, node)]
            fault = nonlinear(node, name, carriers)
            if cell in self.flow.placed:
                fault = f"{name} puts values of another origin among its rows"
            elif not fault and cell in after_position and name not in MOVES:
                fault = f"{name} changes it after its position"
            if fault:
                raise UndeterminedError(f"on the way from {node.all_input_nodes[0]} to attention {fault}")

    def _carries(self, argument: fx.Node, node: fx.Node) -> bool:
        derived = any(parent.node is argument for parent in self.flow.parents[Cell(node)])
        return derived or self.flow.is_blank(argument)

    def _nodes(self, cells: Iterable[Cell], known: set[fx.Node]) -> list[fx.Node]:
        """The nodes of some cells in order, with the memory that they write into."""
        inside = set(cells)
        nodes = {cell.node for cell in inside if cell.after is None and cell.node not in known}
        written = {self.flow.storage(target) for node in nodes for target in operation(node)[1]}
        needed = [cell.node for cell in inside if cell.after is not None]
        needed += [argument for node in nodes for argument in node.all_input_nodes]
        for node in needed:
            if node in nodes or node in known or self.flow.storage(node) not in written:
                continue
            for view in self._up_to_memory(node, nodes | known):
                nodes.add(view)
        return sorted(nodes, key=self.flow.order.__getitem__)

    def _up_to_memory(self, node: fx.Node, known: set[fx.Node]) -> list[fx.Node]:
        """A view and what it is a view of, up to something known or to memory that was made without data."""
        chain = []
        current: fx.Node | None = node
        while current is not None and current not in known:
            chain.append(current)
            current = self.flow.base(current)
        made = operation(chain[-1])[0] in BLANKS and not any(operation(node)[1] for node in chain)
        if current is None and not made:
            raise UndeterminedError("it is written into memory that holds something else")
        return chain

    def _with_writes(self, entry: Entry, plain: list[fx.Node], mapped: list[fx.Node]) -> Entry:
        earlier = {self.flow.order[node] for node in self.flow.writes_since(entry.start)}
        end, start = self.flow.storage(entry.end.node), self.flow.storage(entry.start.node)
        rewritten = (self._write(plain, end), self._write(mapped, start))
        return Entry(entry.start, entry.end, bool(earlier), rewritten, entry.info, entry.head_dim)

    def _write(self, nodes: list[fx.Node], storage: int | None) -> bool:
        return any(self.flow.storage(target) == storage for node in nodes for target in operation(node)[1])

    # ------------------------------------------------------------------------------------------------------ the graph

    def _before(self, cells: Iterable[Cell]) -> set[Cell]:
        """Some cells, and what they derive from."""
        todo = list(cells)
        seen = set(todo)
        for cell in todo:
            fresh = [parent for parent in self.flow.parents[cell] if parent not in seen]
            seen.update(fresh)
            todo.extend(fresh)
        return seen

    def _after(self, cells: Iterable[Cell]) -> list[Cell]:
        """What derives from some cells, without them."""
        todo, seen = list(cells), set()
        for cell in todo:
            fresh = [child for child in self.children[cell] if child not in seen]
            seen.update(fresh)
            todo.extend(fresh)
        return self._sorted(seen)

    def _sorted(self, cells: Iterable[Cell]) -> list[Cell]:
        return sorted(cells, key=self.number.__getitem__)


def features(value: Any, info: TensorInfo, head_dim: int, feature_map: str) -> Any:
    """phi of a value in its dtype. For tensors and for `fx.Proxy` objects.

    Args:
        info: of the value, whose last axis holds one head or several.
    """
    phi, _ = find_feature_map(feature_map)
    if info.shape[-1] == head_dim:
        return phi(value).to(info.dtype)
    heads = value.unflatten(-1, (-1, head_dim))  # a softmax is over one head
    return phi(heads).to(info.dtype).flatten(-2)


@contextlib.contextmanager
def told_of(site: str, role: str) -> Iterator[None]:
    """Whatever is undetermined inside is an error that names the site and the operand."""
    try:
        yield
    except UndeterminedError as reason:
        raise position_error(site, role, str(reason)) from reason


def position_error(site: str, role: str, reason: str) -> PositionReplayError:
    """What is raised when one operand's position is undetermined."""
    return PositionReplayError(
        f"the position encoding of {site or 'the model'!r} cannot be replayed on the features of its {role}: {reason}. "
        'Convert with rope_placement="rotate-then-map", which needs no more than the query and the key.'
    )


def passed_over(node: fx.Node) -> fx.Node:
    """What a node multiplies by a number."""
    return node.all_input_nodes[0]
