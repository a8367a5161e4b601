"""One forward of a model under a probe, without memory where possible, and the model afterwards as it was before.

The forward runs on fake tensors (weights are neither copied nor read) and, when the model's forward reads values, on
real ones; on the meta device when the model is there, the second time with what the forward itself makes there, too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

# Private. Seen in torch 2.11 and 2.13; tests/salad_compile/discovery/test_discover.py fails when it moves.
from torch._subclasses.fake_tensor import FakeTensorMode

from salad_compile.calls import autograd_functions
from salad_compile.calls.adapters import warn_of_unmet
from salad_compile.calls.flash_family import find_family
from salad_compile.calls.flex_attention import seen_by_modes, stand_in
from salad_compile.calls.multihead import take_apart_for_discovery
from salad_compile.common.foreign_hooks import execution_device, without_foreign_hooks
from salad_compile.common.logs import logger
from salad_compile.common.placement import placement
from salad_compile.common.projections import may_project, says_its_widths
from salad_compile.discovery.history import history, ordinary
from salad_compile.discovery.inputs import normalise_inputs, synthesise_inputs
from salad_compile.discovery.probe import Probe, named_inputs
from salad_compile.discovery.reachable_state import ReachableState
from salad_compile.discovery.weights import gather_weights, keep_values
from salad_compile.errors import AdapterError, InputsError, ProbeError
from salad_compile.position.recording import OperationRecording
from salad_compile.sites.branch import BRANCH_NAME, SaladBranch


def run_probe(model: nn.Module, example_inputs: Any, *, replay_position: bool = False) -> Probe:
    """One forward of `model` under a :class:`Probe`, without memory where possible."""
    find_family()
    device, dtype = placement(model)
    on_meta = device.type == "meta"
    failure: Exception | None = None
    for last in (False, True):
        small = last and not on_meta  # real tensors: the smallest video that shows the structure
        fake = contextlib.nullcontext() if last or on_meta else FakeTensorMode(allow_non_fake_inputs=True)
        default = torch.device("meta") if last and on_meta else contextlib.nullcontext()
        try:
            with history(), keep_values(model), fake:
                args, kwargs = _inputs(model, example_inputs, device, dtype, small=small)
                with _without_hooks(model, device, real=small):
                    return _forward(model, args, kwargs, replay_position, default)
        except (InputsError, AdapterError):
            raise
        except Exception as error:
            # whatever the model raises: on fake tensors anything that reads values fails, each in its own way
            if not (last or on_meta):
                _warn_of_fallback(error, synthetic=example_inputs is None)
            if failure is None or not on_meta:
                failure = error
    raise ProbeError(
        f"the forward of {type(model).__name__} failed while looking for attention: "
        f"{type(failure).__name__}: {failure}\nPass example_inputs that the model accepts, as a tuple of positional "
        "or a dict of keyword inputs. Inputs belong on the device of the weights; a model on the meta device "
        "whose forward reads values needs real weights."
    ) from failure


@contextlib.contextmanager
def _without_hooks(model: nn.Module, device: torch.device, *, real: bool) -> Iterator[None]:
    """Without the hooks of others, which cache results or move weights; what moves real weights is needed."""
    with _keep_state(model), without_foreign_hooks(model, keep_placement=real):
        if not real and any(execution_device(module) is not None for module in model.modules()):
            gather_weights(model, device)
        yield


def _warn_of_fallback(error: Exception, *, synthetic: bool) -> None:
    size = " with a small synthetic video, whose token counts mean nothing" if synthetic else ""
    logger.warning(
        "the forward on fake tensors failed (%s: %s); trying real tensors%s. example_inputs decide what is looked at.",
        *(type(error).__name__, error, size),
    )


_SMALL_LATENT, _SMALL_TEXT = (5, 16, 16), 32


def _inputs(
    model: nn.Module, example_inputs: Any, device: torch.device, dtype: torch.dtype, *, small: bool
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if example_inputs is not None:
        args, kwargs = normalise_inputs(model, example_inputs)
        return (args, kwargs) if device.type != "meta" else _features_to_meta((args, kwargs))
    size: dict[str, Any] = {"latent_size": _SMALL_LATENT, "text_tokens": _SMALL_TEXT} if small else {}
    return (), synthesise_inputs(model, device=device, dtype=dtype, **size)


def _features_to_meta(given: Any) -> Any:
    """Where the weights have no values, features need none; sizes and positions, which it may read, keep theirs."""
    if type(given) in (list, tuple):
        return type(given)(_features_to_meta(item) for item in given)
    if type(given) is dict:
        return {name: _features_to_meta(item) for name, item in given.items()}
    is_feature = isinstance(given, Tensor) and given.dim() > 0 and (given.is_floating_point() or given.is_complex())
    return given.to("meta") if is_feature else given


def _forward(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    replay_position: bool,
    default: contextlib.AbstractContextManager[Any],
) -> Probe:
    """Args: default: within which the model's own forward runs, and nothing of ours."""
    probe = Probe(recording=OperationRecording() if replay_position else None)
    with (
        _install_hooks(model, probe),
        torch.compiler.set_stance("force_eager"),  # parts that are compiled already show nothing to a mode
        torch.random.fork_rng(devices=[]),
        torch.enable_grad(),
        seen_by_modes(stand_in),
        autograd_functions.seen_by_modes(),
        probe,
    ):
        args, kwargs = tuple(_with_history(v) for v in args), {k: _with_history(v) for k, v in kwargs.items()}
        probe.inputs = named_inputs(model, args, kwargs)
        with probe.look_away():
            probe.axes.start(probe.inputs)
            probe.labels.start({name: _features(given) for name, given in probe.inputs.items()})
        with default:
            model(*args, **kwargs)
    warn_of_unmet()
    return probe


def _features(given: Any) -> list[Tensor]:
    """The tensors of an argument to which :func:`_with_history` gave a history."""
    values = given if isinstance(given, (list, tuple)) else [given]
    return [value for value in values if isinstance(value, Tensor) and value.grad_fn is not None]


def _with_history(value: Any) -> Any:
    """Features that already have an autograd node, so that views and casts of one tensor are recognised as the same."""
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(_with_history(item) for item in value)
    value = ordinary(value)
    if isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 3:
        return value.detach().requires_grad_().clone()  # no leaf: models write into their inputs
    return value


@contextlib.contextmanager
def _install_hooks(model: nn.Module, probe: Probe) -> Iterator[None]:
    handles = []
    for name, module in model.named_modules():
        if may_project(module):
            handles += [
                module.register_forward_pre_hook(lambda *_: probe.enter_linear()),
                module.register_forward_hook(
                    lambda module, args, kwargs, out, name=name: probe.leave_linear(name, module, args, kwargs, out),
                    with_kwargs=True,
                ),
            ]
        if not says_its_widths(module):
            handles += [
                module.register_forward_pre_hook(
                    lambda module, args, kwargs, name=name: probe.enter(name, module, args, kwargs), with_kwargs=True
                ),
                module.register_forward_hook(lambda *_: probe.leave(), always_call=True),
            ]
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            handles.append(
                module.register_forward_hook(
                    lambda _, args, out: probe.leave_convolution(args[0] if args else None, out)
                )
            )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _keep_state(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards all as before: models cache position tables on themselves and elsewhere."""
    state, forwards = ReachableState(model), contextlib.ExitStack()
    try:
        for module in model.modules():
            module.training = False  # gradient checkpointing and dropout are for training
            if isinstance(branch := module._modules.get(BRANCH_NAME), SaladBranch):
                forwards.callback(branch.detach_forward(module))  # a converted model is probed as the model that it was
        take_apart_for_discovery(model)
        yield
    finally:
        forwards.close()
        state.put_back()
