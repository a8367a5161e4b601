"""One forward of a model without memory, that shows its attention calls and where their operands come from.

Every module that may be a projection gets a hook that marks its output with an autograd node of ours. A function mode
sees the attention calls and walks the autograd graph from query, key and value back to those marks: identity, not
names. How the forward is run: probe_forward.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor, fx

# Private. Seen in torch 2.11 and 2.13; tests/salad_compile/discovery/test_discover.py fails when it moves.
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from salad_compile.calls import autograd_functions
from salad_compile.calls.adapters import AttentionArguments, bind, is_attention, result_of
from salad_compile.calls.flash_family import run_or_stand_in
from salad_compile.calls.kinds import CallKind, kind_of
from salad_compile.calls.softmax_products import ManualAttention, of_tensors
from salad_compile.common.projections import fits, projection_call, says_its_widths
from salad_compile.common.signatures import argument_names
from salad_compile.common.torch_calls import name_of
from salad_compile.discovery.channel_axes import ChannelAxes
from salad_compile.discovery.channels import ChannelTracker
from salad_compile.discovery.history import history, ordinary, write_into_memory
from salad_compile.discovery.token_labels import TokenLabels
from salad_compile.position.operations import writes
from salad_compile.position.recording import OperationRecording, Recorded, position_fault
from salad_compile.position.rows import RowTracker
from salad_compile.position.rows import of_tensors as rows_of_tensors

_PRODUCTS = {"linear", "matmul", "mm", "bmm", "addmm", "einsum", "tensordot", "conv1d", "conv2d", "conv3d"}
_CATS = frozenset({torch.cat, torch.concat, torch.concatenate})

# How far an output projection may lie behind its attention call, in autograd nodes. Wan has three between them.
_OUT_WALK = 64


class _Mark(torch.autograd.Function):
    """An identity whose only purpose is the autograd node that it leaves behind."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()  # and not a view of it, into which no model could write

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _mark(x: Tensor) -> Tensor:
    # the output of a quantised projection has no autograd graph: start one here
    result: Tensor = _Mark.apply(x if x.requires_grad else x.detach().requires_grad_())  # type: ignore[no-untyped-call]
    return result


# An autograd node and which of its outputs is meant, as in `next_functions`.
Edge = tuple[Any, int]


@dataclass(frozen=True)
class Cat:
    """A concatenation: its dimension, counted from the end, and for each part its length and autograd edge."""

    dim: int
    sizes: tuple[int, ...]
    edges: tuple[Edge, ...]


@dataclass(frozen=True)
class Projection:
    name: str
    gate_input: Tensor  # kept alive: the id of a freed tensor would be reused
    node: Any  # the mark on its output
    width: int  # of its output
    first_row: int  # the number of its first row, see position/rows.py
    labels: Tensor  # of each of its rows: from which inputs of the model it comes, see token_labels.py

    def owns(self, rows: Tensor) -> Tensor:
        """Which of some rows are its own."""
        return (rows >= self.first_row) & (rows < self.first_row + self.labels.numel())


@dataclass(frozen=True)
class Frame:
    """One running module: its name, the number of the invocation, and the shapes of its tensor arguments by name."""

    name: str
    invocation: int
    arguments: Mapping[str, torch.Size] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Out:
    """A projection that read the result of an attention call, and how many rows it read."""

    name: str
    rows: int


@dataclass(eq=False)
class Call:
    arguments: AttentionArguments
    made_by: tuple[list[Projection], list[Projection], list[Projection]]
    stack: tuple[Frame, ...]  # outermost first
    kind: CallKind
    outs: list[Out] = field(default_factory=list)  # projections that read the result, in order of execution
    rows: Tensor | str = ""  # which row of a projection each query is, (B, S), or why that is not known
    key_rows: Tensor | str = ""
    value_rows: Tensor | str = ""
    # the operand for which map-then-rotate is not possible, and why, if that was asked for
    position_fault: tuple[str, str] | None = None

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """(B, H, S, D) of query, key and value."""
        batch = self.arguments.batch
        samples = 1 if batch is None else batch.shape[0] - 1
        operands = (self.arguments.query, self.arguments.key, self.arguments.value)
        return tuple(self.arguments.shape(operand.shape, samples) for operand in operands)


@dataclass
class Probe(Recorded, TorchFunctionMode):
    """Records of one forward: attention calls, concatenations, patch grids, and the model's own inputs.

    Attributes:
        calls: in execution order. cats: by autograd node.
        inputs: arguments of the root's forward by name.
        convolved: output sizes (T, H, W) or (H, W) of convolutions.
        channels: of projections' outputs, followed. runs: of projections, each with the modules that were running.
        recording: of all operations, to see whether position can be replayed; None if that is not needed.
        rows: which row of a projection each value is. labels: from which inputs its tokens come.
        axes: which axes of the inputs are channels.
    """

    calls: list[Call] = field(default_factory=list)
    cats: dict[Any, Cat] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)
    convolved: list[tuple[int, ...]] = field(default_factory=list)
    recording: OperationRecording | None = None
    runs: list[tuple[str, tuple[Frame, ...]]] = field(default_factory=list)
    channels: ChannelTracker = field(default_factory=ChannelTracker)
    rows: RowTracker = field(default_factory=lambda: rows_of_tensors(WeakIdKeyDictionary()))
    labels: TokenLabels = field(default_factory=TokenLabels)
    axes: ChannelAxes = field(default_factory=ChannelAxes)
    _by_hand: ManualAttention = field(init=False)
    _projections: dict[Any, Projection] = field(default_factory=dict)
    _outputs: dict[Any, Call] = field(default_factory=dict)
    _stack: list[Frame] = field(default_factory=list)
    _invocations: Iterator[int] = field(default_factory=itertools.count)
    _linear_depth: int = 0
    _products: int = 0  # so far: a module that does not say its widths projects only if there is one inside
    _began: list[int] = field(default_factory=list)
    _looks_away: bool = False  # while nothing of what runs is the model's
    _sources: dict[Any, fx.Node] = field(default_factory=dict)  # by autograd node

    def __post_init__(self) -> None:
        super().__init__()
        self._by_hand = of_tensors(self.permute)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._looks_away or func is torch._C._set_grad_enabled:
            return func(*args, **kwargs)
        with history():
            return self._run(func, *ordinary((args, kwargs)))

    def _run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One operation of the model, with autograd."""
        if func is Tensor.__deepcopy__:
            return self._deep_copy(*args)
        if is_attention(func):
            arguments = bind(func, args, kwargs, lambda tensor: tensor.dim())
        else:
            by_hand = self._by_hand.bind(func, args, kwargs)
            if by_hand is None:
                return self._other(func, args, kwargs)
            arguments = self._with_heads(by_hand)
        autograd_functions.leave_function()
        operands = (arguments.query, arguments.key, arguments.value)
        rows = [self.rows.rows(operand, arguments.heads_first) for operand in operands]
        query, key, value = map(self._sources_of, operands, rows)
        call = Call(arguments, (query, key, value), tuple(self._stack), kind_of(func, arguments))
        call.rows, call.key_rows, call.value_rows = rows
        self.calls.append(call)
        if self.recording is not None:
            sources = {self._sources[made.node]: None for made in (*query, *key)}
            roles = {"query": arguments.query, "key": arguments.key}
            call.position_fault = self._joined_fault(call) or position_fault(self.recording, list(sources), roles)
        return self._answer(func, call, run_or_stand_in(func, arguments, args, kwargs))

    def _deep_copy(self, tensor: Tensor, memo: dict[int, Any]) -> Tensor:
        """What `copy.deepcopy` makes of a tensor, as an operation that has a gradient.

        Torch copies a fake tensor with its attributes, among them the mode that made it, and in that mode raw pointers
        to storages: both copies would free them (seen in torch 2.13).
        """
        if id(tensor) not in memo:
            memo[id(tensor)] = self._other(Tensor.clone, (tensor,), {})
        copied: Tensor = memo[id(tensor)]
        return copied

    def run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation of the model."""
        return self._follow(func, args, kwargs, super().run(func, args, kwargs))

    def _follow(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        """What an operation of the model returned, noted by all that follow values."""
        self.labels.note(func, args, kwargs, out)
        self.rows.note(func, args, kwargs, out)
        if not self.calls:
            self.axes.note(func, args, kwargs, out)
        return out

    def _other(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            out = self.run(func, args, kwargs)
        except RuntimeError:
            if not writes(func, args, kwargs):
                raise
            out = self._write_past_autograd(func, args, kwargs)
        if func in _CATS:
            self._note_cat(out, *args, **kwargs)
        self._by_hand.note(func, args, kwargs, out)
        self.channels.note(func, args, kwargs, out)
        self._products += name_of(func, args)[0] in _PRODUCTS
        return out

    def _write_past_autograd(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A write that autograd refuses, and inference does not; the value written into stays what it was made from.

        One of several views that autograd saw written into cannot even be asked for its node.
        """

        def call() -> Any:
            return write_into_memory(func, args, kwargs)

        out = call() if self.recording is None else self.recording.record(func, args, kwargs, call)
        return self._follow(func, args, kwargs, out)

    def _with_heads(self, arguments: AttentionArguments) -> AttentionArguments:
        """The first axis of a batched product may be batch and heads in one, which cannot be separated later."""
        rows = {made.gate_input.shape[:-1].numel() for made in self.made_by(arguments.query.grad_fn)}
        if arguments.layout != "HSD" or rows <= {arguments.query.shape[1]}:
            return arguments
        return dataclasses.replace(arguments, reason=arguments.reason or "batch and heads are one axis of its products")

    def _answer(self, func: Any, call: Call, result: Any) -> Any:
        """The call's result, marked, so that its readers can be found."""
        position = call.arguments.output
        out = _mark(result_of(func, call.arguments, result))
        self.labels.keep(out, call.arguments.query)
        self._outputs[out.grad_fn] = call
        return out if position is None else (*result[:position], out, *result[position + 1 :])

    def _note_cat(self, out: Tensor, tensors: Any, dim: int = 0, **_: Any) -> None:
        if out.grad_fn is None or out.dim() < 3:
            return
        from_end = dim if dim < 0 else dim - out.dim()
        parts = [tensor for tensor in tensors if tensor.dim() == out.dim()]
        self.cats[out.grad_fn] = Cat(
            from_end, tuple(t.shape[dim] for t in parts), tuple((t.grad_fn, t.output_nr) for t in parts)
        )

    def leave_convolution(self, x: Any, out: Any) -> None:
        """A convolution over two or three axes has read `x`."""
        self.convolved.append((*out.shape[2:],))
        if isinstance(x, Tensor):
            with self.look_away():
                self.axes.read_by_convolution(x)

    @contextlib.contextmanager
    def look_away(self) -> Iterator[None]:
        """What runs here is not the model's."""
        before, self._looks_away = self._looks_away, True
        try:
            yield
        finally:
            self._looks_away = before

    def made_by(self, node: Any) -> list[Projection]:
        """The marked projections from which a value was computed, without passing through one."""
        ancestors = _ancestors(node, stop=self._is_marked)
        return [self._projections[ancestor] for ancestor in ancestors if ancestor in self._projections]

    def _sources_of(self, operand: Tensor, rows: Tensor | str) -> list[Projection]:
        """The projections of an operand: of several that were joined on the way and taken apart again, its own.

        Args:
            rows: which row of a projection each of its tokens is, or why that is not known.
        """
        made = self.made_by(operand.grad_fn)
        if len(made) > 1 and isinstance(rows, Tensor) and int(rows.min()) >= 0:
            made = [projection for projection in made if projection.owns(rows).any()] or made
        known = self.channels.sources(operand)
        own = [projection for projection in made if known is None or projection.node in known]
        return own or made

    def _joined_fault(self, call: Call) -> tuple[str, str] | None:
        """A replay would run what is done to other projections' results, too, while they are joined."""
        for role, operand, own in zip(
            ("query", "key"), (call.arguments.query, call.arguments.key), call.made_by[:2], strict=True
        ):
            if len(self.made_by(operand.grad_fn)) > len(own):
                return role, (
                    "it is computed together with the results of other projections (joined along the batch, or by one "
                    "operator for both), and taken apart again"
                )
        return None

    def _is_marked(self, node: Any) -> bool:
        return node in self._projections or node in self._outputs

    def cats_before(self, node: Any, *, through_projections: bool) -> Iterator[Cat]:
        """The concatenations from which a value was computed, nearest first, without passing through attention."""
        stop = self._outputs.__contains__ if through_projections else self._is_marked
        return (self.cats[ancestor] for ancestor in _ancestors(node, stop=stop) if ancestor in self.cats)

    def enter(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        shapes = {n: v.shape for n, v in named_inputs(module, args, kwargs).items() if isinstance(v, Tensor)}
        self._stack.append(Frame(name, next(self._invocations), shapes))

    def leave(self) -> None:
        self._stack.pop()

    def enter_linear(self) -> None:
        self._linear_depth += 1
        self._began.append(self._products)

    def leave_linear(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], returned: Any
    ) -> Any:
        """Mark the output of an outermost projection; inside a wrapper (peft's) only the wrapper counts."""
        self._linear_depth -= 1
        began = self._began.pop()
        if self._linear_depth:
            return None
        with history():
            call = projection_call(module, *ordinary((args, kwargs, returned)))
            if call is None or not (call.x.is_floating_point() and call.out.is_floating_point()):
                return None
            if not says_its_widths(module) and not (self._products > began and fits(module, call.x, call.out)):
                return None
            with self.look_away():
                marked = self._mark_projection(name, call.x, call.out)
            return call.rebuild(marked)

    def _mark_projection(self, name: str, gate_input: Tensor, out: Tensor) -> Tensor:
        self._note_out(name, gate_input)
        self.runs.append((name, tuple(self._stack)))
        marked = _mark(out)
        self.channels.add_source(marked.grad_fn, marked)
        self.labels.keep(marked, gate_input)
        labels, first_row = self.labels.of_tokens(gate_input), self.rows.add_source(marked)
        made = Projection(name, gate_input, marked.grad_fn, out.shape[-1], first_row, labels)
        self._projections[marked.grad_fn] = made
        if self.recording is not None:
            self._sources[marked.grad_fn] = self.recording.add_source(marked)
        return marked

    def _note_out(self, name: str, gate_input: Tensor) -> None:
        for node in itertools.islice(_ancestors(gate_input.grad_fn, stop=self._is_marked), _OUT_WALK):
            call = self._outputs.get(node)
            if call is not None:
                call.outs.append(Out(name, gate_input.shape[:-1].numel()))


def _ancestors(start: Any, stop: Callable[[Any], bool]) -> Iterator[Any]:
    """Autograd nodes from `start` backwards, breadth first, each once; nodes at which to stop are yielded too."""
    todo = [start] if start is not None else []
    seen = set(todo)
    for node in todo:
        yield node
        if not stop(node):
            parents = [parent for parent, _ in node.next_functions if parent is not None and parent not in seen]
            seen.update(parents)
            todo.extend(parents)


def named_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of one forward by name; by position where the signature does not name them."""
    names = argument_names(module.forward)
    given = {**dict(zip((*names, *map(str, range(len(names), len(args)))), args, strict=False)), **kwargs}
    return {name: given[name] for name in dict.fromkeys((*names, *given)) if name in given}
