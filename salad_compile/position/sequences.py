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
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor, fx

from salad_compile.definition.operands import Mapped
from salad_compile.position.flow import TensorInfo
from salad_compile.position.operations import writes
from salad_compile.position.recording import (
    OVERWRITTEN,
    UNCOUNTED,
    Moment,
    PositionGraph,
    autocast_state,
    holds_tensors,
    replay,
    tensors_in,
)
from salad_compile.position.slice import Entry, PositionSlice, UndeterminedError, told_of

_MOST_EDGES = 20_000  # of all trees; then they start anew

_CONSTANTS = frozenset(
    {
        *(int, float, bool, str, type(None), type(...)),
        *(torch.dtype, torch.device, torch.layout, torch.memory_format),
    }
)


@dataclass(frozen=True)
class _Found:
    """How one operand got its position.

    Attributes:
        slice: None if it has none.
        needed: nodes whose values a replay reads -> the tensor's number, and how often it was written if that matters.
    """

    slice: PositionSlice | None
    needed: Mapping[fx.Node, tuple[int, int | None]] = field(default_factory=dict)


@dataclass
class _Sequence:
    """Operations up to here.

    Attributes:
        next: edge -> the sequence with that operation.
        writes: operations that write and need no copy of what they overwrite, as they are before they run.
        calls: query and key of an attention call at this point -> how they got their position.
    """

    next: dict[Any, _Sequence] = field(default_factory=dict)
    writes: set[Any] = field(default_factory=set)
    calls: dict[Any, dict[str, _Found]] = field(default_factory=dict)


class _Step(NamedTuple):
    """Something that happened. operation: function, args, kwargs and result; or None: a projection of `tensors`."""

    operation: tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any] | None
    tensors: tuple[Tensor, ...]
    moment: Moment


class _UnknownArgumentError(Exception):
    """An argument that cannot be compared."""


_trees: dict[bool, _Sequence] = {}
_edges = 0


def forget_sequences() -> None:
    """Let every sequence of operations be new again."""
    global _edges
    _trees.clear()
    _edges = 0


class PositionRecording:
    """What the eager twin records of one forward, from which position is replayed.

    Args:
        all_projections: whether projections count that no hook reports.
    """

    def __init__(self, all_projections: bool) -> None:
        self.all_projections = all_projections
        self.graph: PositionGraph | None = None  # once something is new
        self._at: _Sequence | None = _trees.setdefault(all_projections, _Sequence())  # None: not to be remembered
        self._steps: list[_Step] = []
        self._tensors: list[Tensor] = []  # kept alive: the id of a freed tensor would be reused
        self._numbers: dict[int, int] = {}  # id -> place in `_tensors`
        self._first_versions: list[int] = []
        self._storages: dict[int, int] = {}
        self._versions: dict[int, int] = {}  # of the tensors of the edge that is being made, by id

    # ------------------------------------------------------------------------------------------------- what happens

    def run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation of the model and note it."""
        if self._at is None:
            assert self.graph is not None
            return self.graph.run(func, args, kwargs)
        if "out" in kwargs or _may_write(func):
            return self._run_write(func, args, kwargs)
        out = func(*args, **kwargs)
        if isinstance(out, Tensor) or holds_tensors(out):
            self._note(func, args, kwargs, out)
        return out

    def add_projection(self, x: Tensor, out: Tensor) -> None:
        """A projection returned `out` for `x`."""
        if self._at is not None:
            self._versions = {}
            edge = ("projection", self._tensor(x), self._tensor(out))
            step = _Step(None, (x, out), Moment(self._versions, None))
            self._advance(edge, self._at.next.get(edge))
            self._steps.append(step)
        if self.graph is not None:
            self.graph.add_projection(x, out)

    def add_operation(self, func: Callable[..., Any], args: tuple[Any, ...], out: Any) -> None:
        """Something of ours that ran unseen made `out` of `args`; `func` stands for it."""
        if self._at is not None:
            self._note(func, args, {}, out)
        elif self.graph is not None:
            self.graph.record(func, args, {}, lambda: out)

    def _run_write(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An operation that writes: whether a value is copied for it depends on nothing but what ran before it."""
        at = self._at
        assert at is not None
        self._versions = {}
        try:
            edge = self._arguments(func, args, kwargs)
            known = edge in at.writes
        except (_UnknownArgumentError, TypeError):
            self._forget()
            return self.run(func, args, kwargs)
        if self.graph is None and known:
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
        step = self._step(func, args, kwargs, out)
        if self.graph is not None and not in_graph:
            self.graph.record(func, args, kwargs, lambda: out)
        if step is not None:
            self._steps.append(step)

    def _step(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> _Step | None:
        """Go on along an operation that ran; None if it cannot be compared."""
        versions: dict[int, int] = {}
        self._versions = versions
        assert self._at is not None
        try:
            autocast = autocast_state(out)
            edge = (self._arguments(func, args, kwargs), self._result(out), autocast)
            following = self._at.next.get(edge)
        except (_UnknownArgumentError, TypeError):  # of what cannot be hashed
            self._forget()
            return None
        self._advance(edge, following)
        return _Step((func, args, kwargs, out), (), Moment(versions, autocast))

    def _advance(self, edge: Any, following: _Sequence | None) -> None:
        """Go on to `following`; None: to a new sequence, by this edge."""
        global _edges
        assert self._at is not None
        if following is None:
            self._graph()
            if _edges >= _MOST_EDGES:
                forget_sequences()
            _edges += 1
            following = self._at.next.setdefault(edge, _Sequence())
        self._at = following

    def _forget(self) -> None:
        """From here on nothing of this forward is remembered."""
        self._graph()
        self._at = None

    def _graph(self) -> PositionGraph:
        """The operations so far, as a graph that from now on gets those that follow."""
        if self.graph is None:
            self.graph = graph = PositionGraph(self.all_projections)
            for step in self._steps:
                graph.add_past(step.moment, functools.partial(_add, graph, step))
        return self.graph

    # ------------------------------------------------------------------------------------------------------- edges

    def _arguments(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        numbers, first, versions = self._numbers, self._first_versions, self._versions
        key: list[Any] = [func]
        for value in args:
            identity = id(value)
            number = numbers.get(identity)
            if number is None:
                key.append(self._key(value))
                continue
            before = first[number]
            versions[identity] = version = before if before == UNCOUNTED else value._version
            key.append((number, version - before))
        key.append(self._key(kwargs) if kwargs else None)
        return tuple(key)

    def _key(self, value: Any) -> Any:
        """What an argument is compared by. Raises _UnknownArgumentError."""
        kind = type(value)
        if kind is not Tensor:
            if kind in _CONSTANTS:
                # 0.0 and -0.0 are equal
                return (kind, value) if value or kind is not float else (kind, math.copysign(1.0, value))
            if kind is tuple or kind is list:
                return (kind, *[self._key(entry) for entry in value])
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, (tuple, list)):
            return (kind, *map(self._key, value))
        if kind is slice:
            return (kind, self._key(value.start), self._key(value.stop), self._key(value.step))
        if kind is dict:
            return (kind, *((name, self._key(entry)) for name, entry in value.items()))
        raise _UnknownArgumentError

    def _tensor(self, tensor: Tensor) -> tuple[Any, ...]:
        identity = id(tensor)
        number = self._numbers.get(identity)
        try:
            version = tensor._version
        except RuntimeError:  # of inference mode
            version = UNCOUNTED
        self._versions[identity] = version
        if number is not None:
            return (number, version - self._first_versions[number])
        self._numbers[identity] = number = len(self._tensors)
        self._tensors.append(tensor)
        self._first_versions.append(version)
        # exactly a tensor: no parameter, and the check for parameters is slow
        parameter = type(tensor) is not Tensor and isinstance(tensor, nn.Parameter)
        return (number, tensor.shape, tensor.dtype, self._storage(tensor), parameter, version != UNCOUNTED)

    def _storage(self, tensor: Tensor) -> int | None:
        """A number that only tensors of one memory share, in the order in which memories are met."""
        try:
            storage = tensor.untyped_storage()._cdata  # see `TensorInfo.of`
        except (RuntimeError, NotImplementedError):
            return None
        return self._storages.setdefault(storage, len(self._storages))

    def _result(self, out: Any) -> Any:
        if isinstance(out, Tensor):
            known = id(out) in self._numbers  # of operations in place, some of which change the shape
            return (self._tensor(out), out.shape, out.dtype) if known else self._tensor(out)
        if isinstance(out, (tuple, list)):
            return (type(out), *[self._result(part) for part in out])
        return self._key(out)

    # ---------------------------------------------------------------------------------------------------- position

    def mapped(self, query: Tensor, key: Tensor, feature_map: str, site: str) -> Mapped | None:
        """Query and key of an attention call before position, and their features with it, laid out as they are.

        Returns:
            None where no position mixes in between projection and call.

        Raises:
            PositionReplayError: it cannot be told what the position encoding is.
        """
        self._versions = {}
        at, call = self._at, (self._tensor(query), self._tensor(key))
        known = at.calls.get(call) if at is not None and self.graph is None else None
        operands = {"query": query, "key": key}
        if known is not None:
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
            with told_of(site, role):
                pairs[role] = replay(found.slice, operand, feature_map, start_of, value_of)
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


def _add(graph: PositionGraph, step: _Step) -> None:
    if step.operation is None:
        graph.add_projection(*step.tensors)
        return
    func, args, kwargs, out = step.operation
    graph.record(func, args, kwargs, lambda: out)


@functools.lru_cache(maxsize=4096)
def _writes_whatever(func: Callable[..., Any]) -> bool:
    return writes(func, (), {})


def _may_write(func: Callable[..., Any]) -> bool:
    """Whether a function writes into its arguments, unless `out` is among them."""
    try:
        return _writes_whatever(func)
    except TypeError:  # some callables cannot be hashed
        return writes(func, (), {})
