"""The operations of an uncompiled forward as a graph, in which position is found and from which it is run again.

Recorded for the map-then-rotate placement alone, where a sequence of operations is new (sequences.py), and dropped with
the forward.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor, fx

# StorageWeakRef is undocumented. Seen in torch 2.11 and 2.13; position/test_private_names.py fails when it moves.
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakIdKeyDictionary

from salad_compile.position.again import Autocast, autocast_state, run_again
from salad_compile.position.flow import Cell, Flow, TensorInfo
from salad_compile.position.operations import PROJECTIONS, data_arguments, operation, writes
from salad_compile.position.slice import Entry, PositionSlice, UndeterminedError, find_slice

UNCOUNTED = -1  # torch counts no writes into tensors of inference mode
OVERWRITTEN = "what its position is made of has been overwritten by now"


@dataclass(frozen=True)
class _Snapshot:
    """The memory of `root` as it was before position was written into it. order: of the operation that did it."""

    root: fx.Node
    value: Tensor
    order: int


class OperationRecording:
    """The operations of one forward, as nodes that know each other by the identity of tensors."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self._nodes: Any = WeakIdKeyDictionary()
        self._storages: list[StorageWeakRef] = []  # a storage that is known must not get another's number

    def node(self, tensor: Tensor) -> fx.Node:
        """What stands for a tensor."""
        known = self._nodes.get(tensor)
        if known is None:
            known = self._new_node("placeholder", "given", (), {}, tensor)
        return known  # type: ignore[no-any-return]

    def add_source(self, out: Tensor) -> fx.Node:
        """The output of a projection."""
        return self._new_node("placeholder", "projected", (), {}, out)

    def run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation of the model and record it."""
        return self.record(func, args, kwargs, lambda: func(*args, **kwargs))

    def record(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], call: Callable[[], Any]
    ) -> Any:
        """Record an operation. call: runs it, or returns its result if it ran already."""
        if not writes(func, args, kwargs):
            out = call()
            if holds_tensors(out):
                self._add(self._node_of(func, args, kwargs, out), out, args, kwargs)
            return out
        node = self._node_of(func, args, kwargs, None)
        self.before_write(node)
        out = call()
        if isinstance(out, Tensor):
            self._describe(node, out)
        self._add(node, out, args, kwargs)
        return out

    def before_write(self, node: fx.Node) -> None:
        """An operation is about to write into a tensor."""

    def added(self, node: fx.Node, out: Any, given: Mapping[fx.Node, Tensor]) -> None:
        """An operation ran. given: the tensors among its arguments."""

    def _add(self, node: fx.Node, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {self._nodes[tensor]: tensor for tensor in tensors_in((args, kwargs)) if tensor in self._nodes}
        self.added(node, out, given)
        if not isinstance(out, Tensor) and isinstance(out, (tuple, list)):
            for at, part in enumerate(out):
                if isinstance(part, Tensor):
                    self.added(self._new_node("call_function", operator.getitem, (node, at), {}, part), part, {})

    def _node_of(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> fx.Node:
        def node_of(value: Any) -> Any:
            return self.node(value) if isinstance(value, Tensor) else value

        mapped = fx.node.map_aggregate(args, node_of), fx.node.map_aggregate(kwargs, node_of)
        return self._new_node("call_function", func, *mapped, out)

    def _new_node(self, op: str, target: Any, args: Any, kwargs: Any, out: Any) -> fx.Node:
        node = self.graph.create_node(op, target, args, kwargs, name="value")
        if isinstance(out, Tensor):
            self._describe(node, out)
        return node

    def _describe(self, node: fx.Node, out: Tensor) -> None:
        node.meta["info"] = info = TensorInfo.of(out)
        if info is not None:
            self._storages.append(StorageWeakRef(out.untyped_storage()))  # type: ignore[no-untyped-call]
        self._nodes[out] = node


class Runner(Protocol):
    """Runs the operations of a model, and does something with what it sees."""

    def run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation of the model."""


class Recorded:
    """A function mode that runs what it sees through a recording, where there is one."""

    recording: Runner | None

    def run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation of the model."""
        return func(*args, **kwargs) if self.recording is None else self.recording.run(func, args, kwargs)

    def permute(self, tensor: Tensor, axes: tuple[int, ...]) -> Any:
        """Run one of ours, which later ones of the model may stand on."""
        return self.run(Tensor.permute, (tensor, axes), {})


def position_fault(
    recording: OperationRecording, sources: Sequence[fx.Node], operands: Mapping[str, Tensor]
) -> tuple[str, str] | None:
    """The operand of a call on which position cannot be replayed, and why; None if it can.

    Args:
        sources: the projections of these operands. operands: by role.
    """
    flow = Flow(_info, lambda node: False)
    nodes = list(recording.graph.nodes)
    first = min((nodes.index(source) for source in sources), default=len(nodes))
    for node in nodes[first:]:
        if node in sources:
            flow.add_source(node)
        elif node.op == "call_function":
            flow.add(node)
    for role, operand in operands.items():
        try:
            find_slice(flow, recording.node(operand), operand.shape[-1])
        except UndeterminedError as reason:
            return role, str(reason)
    return None


def _info(node: fx.Node) -> TensorInfo | None:
    info: TensorInfo | None = node.meta.get("info")
    return info


class Moment(NamedTuple):
    """When an operation ran. versions: id of a tensor -> how many writes torch had counted. autocast: what was on."""

    versions: Mapping[int, int]
    autocast: Autocast | None


class PositionGraph(OperationRecording):
    """The operations of one forward, with the values that a replay needs.

    Args:
        all_projections: whether projections count that no hook reports.
    """

    def __init__(self, all_projections: bool) -> None:
        super().__init__()
        self.all_projections = all_projections
        self.flow = Flow(_info, lambda node: False)
        self._values: dict[fx.Node, Tensor] = {}
        self._versions: dict[fx.Node, int] = {}
        self._snapshots: dict[int, _Snapshot] = {}
        self._unseen = False  # a write
        self._writes_seen: dict[int, int] = {}  # a memory -> what torch's count of its writes was
        self._moment: Moment | None = None  # of an operation that ran earlier; None: now
        self.used: set[fx.Node] = set()  # whose values replays have read

    def add_past(self, moment: Moment, add: Callable[[], object]) -> None:
        """Add something that happened earlier."""
        self._moment = moment
        try:
            add()
        finally:
            self._moment = None

    def _version(self, tensor: Tensor) -> int | None:
        """Torch's count of the writes into a tensor's memory; None if it does not count."""
        if self._moment is not None and id(tensor) in self._moment.versions:
            version = self._moment.versions[id(tensor)]
            return None if version == UNCOUNTED else version
        return None if tensor.is_inference() else tensor._version

    @property
    def snapshots(self) -> int:
        """How many values were copied before the model wrote position into them."""
        return len(self._snapshots)

    def add_projection(self, x: Tensor, out: Tensor) -> None:
        """A projection returned `out` for `x`."""
        self.flow.add_input(self.node(x))
        self.add_source(out)

    def add_source(self, out: Tensor) -> fx.Node:
        node = super().add_source(out)
        self.flow.add_source(node)
        self._watch(node, out, True)
        self._values[node] = out
        return node

    def find(self, operand: Tensor) -> PositionSlice | None:
        """How an operand of an attention call got its position; None if it has none. Raises UndeterminedError."""
        node = self.node(operand)
        self._watch(node, operand, False)
        if self._unseen:
            raise UndeterminedError("something writes into it that torch functions do not show")
        return find_slice(self.flow, node, operand.shape[-1])

    # ------------------------------------------------------------------------------------------------------ recording

    def added(self, node: fx.Node, out: Any, given: Mapping[fx.Node, Tensor]) -> None:
        written = {self.flow.storage(target) for target in operation(node)[1]}
        for argument, tensor in given.items():
            self._watch(argument, tensor, self.flow.storage(argument) in written)
        self.flow.add(node)
        if isinstance(out, Tensor):
            self._watch(node, out, True)
        node.meta["autocast"] = autocast_state(out) if self._moment is None else self._moment.autocast
        self._keep(node, out, given)
        if self.all_projections and operation(node)[0] in PROJECTIONS and isinstance(out, Tensor):
            self.add_source(out)

    def _watch(self, node: fx.Node, tensor: Tensor, written: bool) -> None:
        """Notice that a value was written into by something that no function mode sees, such as a custom kernel."""
        storage, version = self.flow.storage(node), self._version(tensor)
        if storage is None or version is None or Cell(node) not in self.flow.parents:
            return
        if not written and self._writes_seen.get(storage, version) != version:
            self._unseen = True
        self._writes_seen[storage] = version

    def _keep(self, node: fx.Node, out: Any, given: Mapping[fx.Node, Tensor]) -> None:
        """Hold what a replay may need: values without position, and what position is made of."""
        cell, blank = Cell(node), self.flow.is_blank(node)
        derived = cell in self.flow.parents
        if isinstance(out, Tensor) and (blank or (derived and cell not in self.flow.mixed)):
            self._values[node] = out
        if not (derived or blank):
            return
        data = data_arguments(node, operation(node)[0])
        for argument, tensor in given.items():
            if argument not in self._values and (argument not in data or Cell(argument) not in self.flow.parents):
                self._values[argument] = tensor
                version = self._version(tensor)
                if version is not None:
                    self._versions[argument] = version

    def before_write(self, node: fx.Node) -> None:
        """Where position is written into a value that has none, that value is kept."""
        for target in operation(node)[1]:
            cell, storage = self.flow.read(target), self.flow.storage(target)
            if storage is None or cell not in self.flow.parents or cell in self.flow.mixed:
                continue
            root = self.flow.root(storage)
            if storage not in self._snapshots and self.flow.mixes(node) and root in self._values:
                self._snapshots[storage] = _Snapshot(root, self._values[root].clone(), len(self.flow.order))

    # --------------------------------------------------------------------------------------------------------- replay

    def start_of(self, entry: Entry) -> Tensor:
        """The value at the start of a stream. Raises UndeterminedError."""
        node = entry.start.node
        if not entry.overwritten:
            self.used.add(node)
            return self._values[node]
        storage = self.flow.storage(node)
        snapshot = None if storage is None else self._snapshots.get(storage)
        writers = self.flow.writes_since(entry.start)
        if snapshot is None or any(self.flow.order[writer] < snapshot.order for writer in writers):
            raise UndeterminedError("it is overwritten")
        known: dict[fx.Node, Any] = {snapshot.root: snapshot.value}
        for view in self.flow.views(snapshot.root, node):
            written = operation(view)[1]  # then its write is in the snapshot already
            known[view] = known[written[0]] if written else run_again(view, known, self.value)
        value: Tensor = known[node]
        return value

    def value(self, node: fx.Node) -> Tensor:
        """What a node's tensor holds. Raises UndeterminedError."""
        value = self._values.get(node)
        if value is None:
            raise UndeterminedError(f"{node} is needed and was not kept")
        if node in self._versions and value._version != self._versions[node]:
            raise UndeterminedError(OVERWRITTEN)
        self.used.add(node)
        return value

    def kept(self, node: fx.Node) -> tuple[Tensor, int | None]:
        """A value that a replay has read, and the count of writes that it must have, if that matters."""
        return self._values[node], self._versions.get(node)


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors in nested containers, slices included."""
    found: list[Tensor] = []

    def note(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            found.append(leaf)
        return leaf

    fx.node.map_aggregate(tree, note)
    return found


def holds_tensors(out: Any) -> bool:
    """Whether a result is a tensor, or a tuple or list that has one."""
    return isinstance(out, Tensor) or (isinstance(out, (tuple, list)) and any(isinstance(o, Tensor) for o in out))
