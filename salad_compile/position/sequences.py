"""Position is found once for each sequence of operations; forwards that run the same sequence take what was found.

An uncompiled forward walks down a tree whose edges are operations: the function, its arguments, and what it returned.
As long as every edge is known, nothing is recorded but the tensors themselves. At the first that is not, the operations
so far become a graph (recording.py), and the search runs on that.

An edge names everything that the search reads: constants with their types; tensors by when they were first seen, with
shape, dtype, memory and whether they are parameters; torch's counts of writes, by which a write that no function mode
sees shows; autocast. Values are in no edge and in nothing that is kept: the search does not read them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor, fx

from salad_compile.definition.operands import Mapped
from salad_compile.kernels.direct import without_autograd
from salad_compile.position.again import autocast_state, replay
from salad_compile.position.edges import (
    ONE,
    KnownArguments,
    KnownStep,
    SeenTensors,
    UnknownArgumentError,
    may_write,
)
from salad_compile.position.flow import TensorInfo
from salad_compile.position.program import SliceProgram
from salad_compile.position.recording import (
    OVERWRITTEN,
    UNCOUNTED,
    Moment,
    PositionGraph,
    holds_tensors,
    tensors_in,
)
from salad_compile.position.slice import Entry, PositionSlice, UndeterminedError, position_error, told_of

_MOST_EDGES = 20_000  # of all trees; then they start anew


@dataclass(frozen=True)
class _Found:
    """How one operand got its position.

    Attributes:
        slice: None if it has none.
        needed: nodes whose values a replay reads -> the tensor's number, and how often it was written if that matters.
    """

    slice: PositionSlice | None
    needed: Mapping[fx.Node, tuple[int, int | None]] = field(default_factory=dict)

    @functools.cached_property
    def program(self) -> SliceProgram | None:
        """To run it again without looking at the graph; None without a slice."""
        return None if self.slice is None else SliceProgram(self.slice)


@dataclass
class _Sequence:
    """Operations up to here.

    Attributes:
        next: edge -> the sequence with that operation.
        writes: operations that write and need no copy of what they overwrite, as they are before they run.
        usual, usual_write: of these the ones that came last, which are compared first.
        certain: the usual one, if its result follows from its arguments.
        calls: query and key of an attention call at this point -> how they got their position.
    """

    next: dict[Any, _Sequence] = field(default_factory=dict)
    writes: set[Any] = field(default_factory=set)
    usual: KnownStep[_Sequence] | None = None
    certain: KnownStep[_Sequence] | None = None
    usual_write: KnownArguments | None = None
    calls: dict[Any, dict[str, _Found]] = field(default_factory=dict)


# Something that happened: a function, its arguments and result, and when it was.
_Step: TypeAlias = "tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any, Moment | KnownStep[_Sequence]]"

_trees: dict[bool, _Sequence] = {}
_edges = 0


def forget_sequences() -> None:
    """Let every sequence of operations be new again."""
    global _edges
    _trees.clear()
    _edges = 0


def project(x: Tensor) -> Tensor:
    """Stands for a projection of `x` among the operations."""
    raise NotImplementedError


class PositionRecording(SeenTensors):
    """What the eager twin records of one forward, from which position is replayed.

    Args:
        all_projections: whether projections count that no hook reports.
    """

    def __init__(self, all_projections: bool) -> None:
        super().__init__()
        self.all_projections = all_projections
        self.graph: PositionGraph | None = None  # once something is new
        # the operation that came here before, if :meth:`follow` is the quick way to run it
        self.expected: KnownStep[_Sequence] | None
        self._at: _Sequence | None = _trees.setdefault(all_projections, _Sequence())  # None: not to be remembered
        self._steps: list[_Step] = []
        self.expected = self._at.certain

    # ------------------------------------------------------------------------------------------------- what happens

    def run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation of the model and note it."""
        at = self._at
        if at is None:
            assert self.graph is not None
            return self.graph.run(func, args, kwargs)
        usual = at.usual
        if usual is not None and usual.func is func and usual.is_plain and not kwargs:
            out = func(*args)
            if self.graph is None and self._repeats(usual, args, kwargs, out):
                self._steps.append((func, args, kwargs, out, usual))
                self._go_to(usual.following)
            else:
                self._note(func, args, kwargs, out)
            return out
        if "out" in kwargs or may_write(func):
            return self._run_write(func, args, kwargs)
        out = func(*args, **kwargs)
        if isinstance(out, Tensor) or holds_tensors(out):
            self._note(func, args, kwargs, out)
        return out

    def follow(self, step: KnownStep[_Sequence], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """:meth:`run`, of a call of the function of `expected`: if its arguments are, so is what it returns.

        Every operation comes by here: `_fits` and `_see` are written out, because a call takes as long as they do.
        """
        before, tensors, versions = step.before or step, self._tensors, self._first_versions
        self._versions = self._unread
        try:
            fits = (not step.heeds_autocast or step.is_under_its_autocast()) and before.compare(
                tensors, versions, args, kwargs, self._key, self._is_new
            )
        except UnknownArgumentError:
            fits = False
        if not fits:
            self._forget_since(before.seen)
            return self.run(step.func, args, kwargs)
        out = step.func(*args, **kwargs)
        if step.makes == ONE:
            tensors.append(out)
            try:
                versions.append(out._version)
                counted = True
            except RuntimeError:  # of inference mode
                versions.append(UNCOUNTED)
                counted = False
        else:
            counted = self._see(out) if step.makes else step.counted
        if counted is not step.counted:
            self._forget_since(step.seen)
            self._note(step.func, args, kwargs, out)
            return out
        self._steps.append((step.func, args, kwargs, out, step))
        self._at = following = step.following
        self.expected = following.certain
        return out

    def _go_to(self, following: _Sequence | None) -> None:
        self._at = following
        self.expected = None if following is None or self.graph is not None else following.certain

    def add_projection(self, x: Tensor, out: Tensor) -> None:
        """A projection returned `out` for `x`."""
        if self._at is not None:
            self._note(project, (x,), {}, out)
        elif self.graph is not None:
            self.graph.add_projection(x, out)

    def add_operation(
        self, func: Callable[..., Any], args: tuple[Any, ...], out: Any, kwargs: dict[str, Any] | None = None
    ) -> None:
        """Something that ran unseen, and writes into nothing, made `out` of `args`; `func` stands for it."""
        if self._at is not None:
            self._note(func, args, kwargs or {}, out)
        elif self.graph is not None:
            self.graph.record(func, args, kwargs or {}, lambda: out)

    def _run_write(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An operation that writes: whether a value is copied for it depends on nothing but what ran before it."""
        at = self._at
        assert at is not None
        usual = at.usual_write
        if self.graph is None and usual is not None and usual.func == func and self._fits(usual, args, kwargs):
            out = func(*args, **kwargs)
            self._note(func, args, kwargs, out)
            step = at.usual
            if step is not None and step.following is self._at and step.func == func:
                step.before = usual
                at.certain = step if step.is_certain else None
            return out
        self._versions, seen = {}, len(self._tensors)
        try:
            edge = self._arguments(func, args, kwargs)
            known = edge in at.writes
        except (UnknownArgumentError, TypeError):
            self._forget()
            return self.run(func, args, kwargs)
        if self.graph is None and known:
            at.usual_write = KnownArguments(edge, seen)
            out = func(*args, **kwargs)
            self._note(func, args, kwargs, out)
            return out
        graph = self._graph()
        snapshots, before = graph.snapshots, self._infos((args, kwargs))
        out = graph.run(func, args, kwargs)
        if graph.snapshots != snapshots or self._infos((args, kwargs)) != before:
            self._forget()
            return out
        at.writes.add(edge)
        self._note(func, args, kwargs, out, in_graph=True)
        return out

    def _infos(self, given: Any) -> list[TensorInfo | None]:
        """What a write must not change: else the steps so far could not become a graph later."""
        return [TensorInfo.of(tensor) for tensor in tensors_in(given)]

    def _note(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, in_graph: bool = False
    ) -> None:
        """An operation ran. in_graph: whether the graph has it already."""
        assert self._at is not None
        usual = self._at.usual
        if self.graph is None and usual is not None and usual.func == func and self._repeats(usual, args, kwargs, out):
            self._steps.append((func, args, kwargs, out, usual))
            self._go_to(usual.following)
            return
        moment = self._go_on(func, args, kwargs, out)
        if self.graph is not None and not in_graph:
            _add(self.graph, func, args, kwargs, out)
        if moment is not None:
            self._steps.append((func, args, kwargs, out, moment))

    def _go_on(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> Moment | None:
        """Go on along an operation that ran; None if it cannot be compared."""
        global _edges
        at = self._at
        assert at is not None
        versions: dict[int, int] = {}
        self._versions, seen = versions, len(self._tensors)
        try:
            autocast = autocast_state(out)
            edge = (self._arguments(func, args, kwargs), self._result(out), autocast)
            following = at.next.get(edge)
        except (UnknownArgumentError, TypeError):  # of what cannot be hashed
            self._forget()
            return None
        if following is None:
            self._graph()
            if _edges >= _MOST_EDGES:
                forget_sequences()
            _edges += 1
            following = at.next.setdefault(edge, _Sequence())
        at.usual = usual = KnownStep(edge, seen, following)
        usual.trust(args, tensors_in((args, kwargs)))
        at.certain = usual if usual.is_certain else None
        self._go_to(following)
        return Moment(versions, autocast)

    def _forget(self) -> None:
        """From here on nothing of this forward is remembered."""
        self._graph()
        self._go_to(None)

    def _graph(self) -> PositionGraph:
        """The operations so far, as a graph that from now on gets those that follow."""
        if self.graph is None:
            self.graph = graph = PositionGraph(self.all_projections)
            self.expected = None
            for *step, when in self._steps:
                moment = Moment(self._versions_in(when.edge), when.autocast) if isinstance(when, KnownStep) else when
                graph.add_past(moment, functools.partial(_add, graph, *step))
        return self.graph

    # ---------------------------------------------------------------------------------------------------- position

    def mapped(self, query: Tensor, key: Tensor, feature_map: str, site: str) -> Mapped | None:
        """Query and key of an attention call before position, and their features with it, laid out as they are.

        Returns:
            None where no position mixes in between projection and call.

        Raises:
            PositionReplayError: it cannot be told what the position encoding is.
        """
        self._versions = {}
        at, call = self._at, (self._operand(query), self._operand(key))
        known = at.calls.get(call) if at is not None and self.graph is None else None
        operands = {"query": query, "key": key}
        if known is not None:
            with without_autograd():
                return self._replay_known(known, operands, feature_map, site)
        graph, slices, found, pairs = self._graph(), {}, {}, {}
        for role, operand in operands.items():
            with told_of(site, role):
                slices[role] = graph.find(operand)
        for role, operand in operands.items():
            graph.used = set()
            if any(slice_ is not None for slice_ in slices.values()):
                with told_of(site, role):
                    pairs[role] = replay(slices[role], operand, feature_map, graph.start_of, graph.value)
            if at is not None:
                found[role] = _Found(slices[role], {node: self._needed(graph, node) for node in graph.used})
        if at is not None:
            at.calls[call] = found
        return _mapped(pairs)

    def _replay_known(
        self, known: Mapping[str, _Found], operands: Mapping[str, Tensor], feature_map: str, site: str
    ) -> Mapped | None:
        if all(found.slice is None for found in known.values()):
            return None
        pairs = {}
        for role, operand in operands.items():
            found = known[role]
            start_of = functools.partial(self._start_of, found.needed)
            value_of = functools.partial(self._value_of, found.needed)
            try:
                if found.program is None:
                    pairs[role] = replay(None, operand, feature_map, start_of, value_of)
                else:
                    pairs[role] = found.program.run(feature_map, start_of, value_of)
            except UndeterminedError as reason:
                raise position_error(site, role, str(reason)) from reason
        return _mapped(pairs)

    def _start_of(self, needed: Mapping[fx.Node, tuple[int, int | None]], entry: Entry) -> Tensor:
        return self._tensors[needed[entry.start.node][0]]

    def _value_of(self, needed: Mapping[fx.Node, tuple[int, int | None]], node: fx.Node) -> Tensor:
        number, written = needed[node]
        value = self._tensors[number]
        if written is not None and value._version - self._first_versions[number] != written:
            raise UndeterminedError(OVERWRITTEN)
        return value

    def _needed(self, graph: PositionGraph, node: fx.Node) -> tuple[int, int | None]:
        value, version = graph.kept(node)
        number = self._numbers[id(value)]
        return number, None if version is None else version - self._first_versions[number]


def _mapped(pairs: Mapping[str, tuple[Tensor, Tensor]]) -> Mapped | None:
    """role -> the operand without position, and its features with it."""
    if not pairs:
        return None
    (query, rotated_query), (key, rotated_key) = pairs["query"], pairs["key"]
    return Mapped(query, key, rotated_query, rotated_key)


def _add(
    graph: PositionGraph, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> None:
    if func is project:
        graph.add_projection(args[0], out)
    else:
        graph.record(func, args, kwargs, lambda: out)
