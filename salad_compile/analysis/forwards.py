"""Whole forwards of a converted model, uncompiled, each site's calls handed to a callback."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
from torch import Tensor

from salad_compile.common.progress import ProgressBar
from salad_compile.common.wrappers import single_model
from salad_compile.discovery.inputs import normalise_inputs
from salad_compile.errors import ConfigError, GridMismatchError, InputsError, require_conversion

if TYPE_CHECKING:
    from salad_compile.sites.branch import SaladBranch
from salad_compile.analysis.site_call import SiteCall, observe

ForwardInputs = tuple[tuple[Any, ...], dict[str, Any]]


def converted_branches(model: Any, verb: str) -> tuple[nn.Module, list[SaladBranch]]:
    """The one model behind wrappers, and its branches in the order of its modules.

    Raises:
        ConfigError: a pipeline. NotConvertedError: nothing is converted.
    """
    from salad_compile.sites.branch import branches

    bare = single_model(model, verb)
    known = list(branches(bare).values())
    require_conversion(bool(known), type(bare).__name__)
    return bare, known


def forward_inputs(model: nn.Module, inputs: Any) -> list[ForwardInputs]:
    """The inputs of one or several forwards, checked against the model's signature.

    Args:
        inputs: a dict of keyword inputs, a tuple of positional ones, or an iterable of several such.

    Raises:
        InputsError: something else, none at all, or names that the forward does not take.
    """
    mend = "Give a dict of keyword inputs, a tuple of positional ones, or a list of several such."
    several_dicts = isinstance(inputs, tuple) and bool(inputs) and all(isinstance(each, Mapping) for each in inputs)
    if isinstance(inputs, (Mapping, tuple)) and not several_dicts:
        given = [inputs]
    elif isinstance(inputs, (str, bytes, Tensor)) or not isinstance(inputs, Iterable):
        raise InputsError(f"inputs of a forward cannot be a {type(inputs).__name__}. {mend}")
    else:
        given = list(inputs)
    if not given:
        raise InputsError(f"there are no inputs to run the model with. {mend}")
    for each in given:
        if not isinstance(each, (Mapping, tuple)):
            raise InputsError(f"inputs of a forward cannot be a {type(each).__name__}. {mend}")
    return [normalise_inputs(model, each) for each in given]


def run_observed(
    model: nn.Module, inputs: list[ForwardInputs], callback: Callable[[int, SiteCall], None], what: str
) -> None:
    """Run forwards, uncompiled, in eval mode and without gradients, and hand each site's calls to `callback`.

    Afterwards training modes and switches are as they were. On a terminal a bar on stderr counts the sites.

    Args:
        model: a converted model without wrappers around the whole.
        callback: takes the number of the forward and the call.
        what: one word for the bar.

    Raises:
        InputsError: a forward fails, or a converted site does not run in it.
    """
    from salad_compile.sites.branch import branches

    owners = {branch.record.owner for branch in branches(model).values()}
    with _prepared(model), ProgressBar(what, len(inputs) * len(owners)) as bar, torch.no_grad():
        for number, given in enumerate(inputs):
            watch = _Watch(number, callback, bar.advance)
            _run_one(model, given, watch)
            if missing := sorted(owners - watch.seen):
                raise InputsError(
                    f"inputs number {number} ran the model without its converted sites {', '.join(missing[:3])}"
                    f"{' and more' if len(missing) > 3 else ''}. Give inputs with which all of them run."
                )


class _Watch:
    """Hands the calls of one forward on, and remembers which sites came and whether the callback failed."""

    def __init__(self, number: int, callback: Callable[[int, SiteCall], None], advance: Callable[[], None]) -> None:
        self.number, self.callback, self.advance = number, callback, advance
        self.seen: set[str] = set()
        self.failed = False

    def __call__(self, call: SiteCall) -> None:
        self.seen.add(call.branch.record.owner)
        try:
            self.callback(self.number, call)
        except BaseException:
            self.failed = True
            raise
        self.advance()


def _run_one(model: nn.Module, given: ForwardInputs, watch: _Watch) -> None:
    args, kwargs = given
    try:
        with observe(watch):
            model(*args, **kwargs)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
        if watch.failed or isinstance(error, torch.OutOfMemoryError) or not _is_of_inputs(error):
            raise
        raise InputsError(_failure(model, watch.number, args, kwargs, error)) from error


def _is_of_inputs(error: Exception) -> bool:
    """Our own errors say what to do; of them, only the grid's is about inputs."""
    from salad_compile.errors import SaladError

    return isinstance(error, GridMismatchError) or not isinstance(error, SaladError)


def _failure(model: nn.Module, number: int, args: tuple[Any, ...], kwargs: Mapping[str, Any], error: Exception) -> str:
    named = {**{str(position): value for position, value in enumerate(args)}, **kwargs}
    shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in named.items() if isinstance(value, Tensor))
    return (
        f"the forward of {type(model).__name__} failed with inputs number {number} (tensors: {shapes or 'none'}): "
        f"{type(error).__name__}: {error}\nGive inputs as one denoising step of this model takes them, on its device "
        "and in its dtype."
    )


@contextlib.contextmanager
def _prepared(model: nn.Module) -> Iterator[None]:
    """Eval mode, SALAD switched on at all sites, and nothing compiled."""
    from salad_compile.sites.branch import branches
    from salad_compile.sites.site import hold_dense

    known = branches(model).values()
    if any(branch.group for branch in known):
        raise ConfigError("look at a model before its tokens are split over processes (parallelise), not afterwards.")
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        # before Dynamo was loaded nothing can be compiled, and loading it takes seconds
        eager = _forced_eager() if "torch._dynamo" in sys.modules else contextlib.nullcontext()
        with hold_dense(known, False), eager:
            yield
    finally:
        for module in training:
            module.training = True


def _forced_eager() -> contextlib.AbstractContextManager[Any]:
    stance: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance
