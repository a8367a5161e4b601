"""One forward of a model without memory, that shows its attention calls and where their operands come from.

Every module that looks like a Linear gets a hook that marks its output with an autograd node of ours. A function mode
sees the attention calls and walks the autograd graph from query, key and value back to those marks: identity, not
names. The forward runs on fake tensors (weights are neither copied nor read), on the meta device when the model is
there, and on real tensors only when the model's forward reads values.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

# Private. Seen in torch 2.11 and 2.13; tests/salad_compile/test_discovery.py fails when it moves.
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from .attention_call import ATTENTION_FUNCTIONS, AttentionArguments
from .branch import BRANCH_NAME, SaladBranch
from .errors import InputsError, ProbeError
from .inputs import normalise_inputs, synthesise_inputs
from .logs import logger

# How far an output projection may lie behind its attention call, in autograd nodes. Wan has three between them.
_OUT_WALK = 64


class _Mark(torch.autograd.Function):
    """An identity whose only purpose is the autograd node that it leaves behind."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _marked(x: Tensor) -> Tensor:
    # quantised projections answer without an autograd graph: start one here
    result: Tensor = _Mark.apply(x if x.requires_grad else x.detach().requires_grad_())  # type: ignore[no-untyped-call]
    return result


@dataclass
class Projection:
    name: str
    gate_input: Tensor  # kept alive: the id of a freed tensor would be reused


@dataclass
class Call:
    arguments: AttentionArguments
    made_by: tuple[list[Projection], list[Projection], list[Projection]]
    stack: tuple[tuple[str, int], ...]  # (module name, number of its invocation), outermost first
    out: str | None = None

    @property
    def shapes(self) -> tuple[torch.Size, torch.Size, torch.Size]:
        return self.arguments.query.shape, self.arguments.key.shape, self.arguments.value.shape


@dataclass
class Probe(TorchFunctionMode):
    """What one forward showed: the attention calls, and the token counts of the model's own inputs."""

    calls: list[Call] = field(default_factory=list)
    input_tokens: dict[str, int] = field(default_factory=dict)
    _projections: dict[Any, Projection] = field(default_factory=dict)
    _outputs: dict[Any, Call] = field(default_factory=dict)
    _stack: list[tuple[str, int]] = field(default_factory=list)
    _invocations: Iterator[int] = field(default_factory=itertools.count)
    _linear_depth: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in ATTENTION_FUNCTIONS:
            return func(*args, **kwargs)
        arguments = AttentionArguments.bind(args, kwargs)
        query, key, value = (self._made_by(t) for t in (arguments.query, arguments.key, arguments.value))
        call = Call(arguments, (query, key, value), tuple(self._stack))
        self.calls.append(call)
        out = _marked(func(*args, **kwargs))
        self._outputs[out.grad_fn] = call
        return out

    def _made_by(self, tensor: Tensor) -> list[Projection]:
        """The marked projections from which a value was computed, without passing through one."""
        found: list[Projection] = []
        for node in _ancestors(tensor.grad_fn, stop=self._is_marked):
            if node in self._projections:
                found.append(self._projections[node])
        return found

    def _is_marked(self, node: Any) -> bool:
        return node in self._projections or node in self._outputs

    def enter(self, name: str) -> None:
        self._stack.append((name, next(self._invocations)))

    def leave(self) -> None:
        self._stack.pop()

    def enter_linear(self) -> None:
        self._linear_depth += 1

    def leave_linear(self, name: str, gate_input: Any, out: Any) -> Any:
        """Mark the output of an outermost Linear; inside a wrapper (peft's) only the wrapper counts."""
        self._linear_depth -= 1
        if self._linear_depth or not isinstance(out, Tensor) or not out.is_floating_point():
            return None
        if isinstance(gate_input, Tensor):
            self._note_out(name, gate_input)
        marked = _marked(out)
        self._projections[marked.grad_fn] = Projection(name, gate_input)
        return marked

    def _note_out(self, name: str, gate_input: Tensor) -> None:
        for node in itertools.islice(_ancestors(gate_input.grad_fn, stop=self._is_marked), _OUT_WALK):
            call = self._outputs.get(node)
            if call is not None and call.out is None:
                call.out = name


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


def is_linear(module: nn.Module) -> bool:
    """A projection: torch's Linear, or what quantisers and adapters put in its place."""
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    return isinstance(module, nn.Linear) or all(isinstance(size, int) for size in sizes)


def run_probe(model: nn.Module, example_inputs: Any) -> Probe:
    """One forward of `model` under a :class:`Probe`, without memory where possible."""
    device, dtype = _placement(model)
    on_meta = device.type == "meta"
    attempts: list[contextlib.AbstractContextManager[Any]] = [contextlib.nullcontext()]
    if not on_meta:
        attempts.insert(0, FakeTensorMode(allow_non_fake_inputs=True))
    failure: Exception | None = None
    for attempt in attempts:
        small = failure is not None  # real tensors: the smallest video that shows the structure
        try:
            with attempt:
                args, kwargs = _inputs(model, example_inputs, device, dtype, small=small)
                return _forward(model, args, kwargs)
        except InputsError:
            raise
        except Exception as error:
            # whatever the model raises: on fake tensors anything that reads values fails, each in its own way
            _tell_fallback(error, last=attempt is attempts[-1], synthetic=example_inputs is None)
            failure = error
    raise ProbeError(
        f"the forward of {type(model).__name__} failed while looking for attention: "
        f"{type(failure).__name__}: {failure}\nPass example_inputs that the model accepts, as a tuple of positional "
        "or a dict of keyword inputs. A model on the meta device whose forward reads values needs real weights."
    ) from failure


def _tell_fallback(error: Exception, *, last: bool, synthetic: bool) -> None:
    if last:
        return
    size = " with a small synthetic video, whose token counts mean nothing" if synthetic else ""
    logger.warning(
        "the forward on fake tensors failed (%s: %s); trying real tensors%s. example_inputs decide what is looked at.",
        *(type(error).__name__, error, size),
    )


def _placement(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    if not parameters:
        return torch.device("cpu"), torch.float32
    # the dtype of most parameters stands for the model: some keep norms and embeddings in fp32
    counts: dict[torch.dtype, int] = {}
    for parameter in parameters:
        if parameter.dtype.itemsize > 1:  # not 8-bit storage formats
            counts[parameter.dtype] = counts.get(parameter.dtype, 0) + parameter.numel()
    return parameters[0].device, max(counts, key=counts.__getitem__, default=torch.float32)


_SMALL_LATENT, _SMALL_TEXT = (5, 16, 16), 32


def _inputs(
    model: nn.Module, example_inputs: Any, device: torch.device, dtype: torch.dtype, *, small: bool
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if example_inputs is not None:
        return normalise_inputs(model, example_inputs)
    size: dict[str, Any] = {"latent_size": _SMALL_LATENT, "text_tokens": _SMALL_TEXT} if small else {}
    return (), synthesise_inputs(model, device=device, dtype=dtype, **size)


def _forward(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Probe:
    probe = Probe()
    probe.input_tokens = _input_tokens(_named_inputs(model, args, kwargs))
    with (
        _untouched(model),
        _hooked(model, probe),
        torch.compiler.set_stance("force_eager"),  # parts that are compiled already show nothing to a mode
        torch.random.fork_rng(devices=[]),
        torch.enable_grad(),
        probe,
    ):
        model(*(_with_history(value) for value in args), **{k: _with_history(v) for k, v in kwargs.items()})
    return probe


def _with_history(value: Any) -> Any:
    """Features that already have an autograd node, so that views and casts of them can be told to be the same."""
    if isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 3:
        return value.detach().requires_grad_().clone()  # no leaf: models write into their inputs
    return value


def _named_inputs(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)
    except TypeError:
        return {**{str(i): value for i, value in enumerate(args)}, **kwargs}


def _input_tokens(inputs: Mapping[str, Any]) -> dict[str, int]:
    """Input name -> tokens, for the (batch, tokens, channels) inputs that are not the video.

    The video is what comes as a grid (more than three dimensions); packed, it is the input with the most tokens.
    """
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and value.ndim >= 3}
    tokens = {name: tensor.shape[1] for name, tensor in tensors.items() if tensor.ndim == 3}
    packed = len(tokens) == len(tensors)
    video = max(tokens.values(), default=None) if packed else None
    return {name: count for name, count in tokens.items() if count != video}


@contextlib.contextmanager
def _hooked(model: nn.Module, probe: Probe) -> Iterator[None]:
    handles = []
    for name, module in model.named_modules():
        if is_linear(module):
            handles += [
                module.register_forward_pre_hook(lambda *_: probe.enter_linear()),
                module.register_forward_hook(
                    lambda _, args, out, name=name: probe.leave_linear(name, args[0] if args else None, out)
                ),
            ]
        else:
            handles += [
                module.register_forward_pre_hook(lambda *_, name=name: probe.enter(name)),
                module.register_forward_hook(lambda *_: probe.leave(), always_call=True),
            ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards every attribute as before: models cache position tables on themselves."""
    before = [
        (module, {name: dict(v) if type(v) is dict else v for name, v in module.__dict__.items()})
        for module in model.modules()
    ]
    try:
        for module, _ in before:
            module.training = False  # gradient checkpointing and dropout are for training
            if isinstance(branch := module._modules.get(BRANCH_NAME), SaladBranch):
                branch.detach_forward(module)  # a converted model is probed as the model that it was
        yield
    finally:
        for module, attributes in before:
            for name in [name for name in module.__dict__ if name not in attributes]:
                del module.__dict__[name]
            for name, value in attributes.items():
                current = module.__dict__.get(name)
                if type(value) is dict and type(current) is dict:
                    current.clear()
                    current.update(value)
                else:
                    module.__dict__[name] = value
