"""Projections as models have them: torch's Linear, what takes its place, and other modules that do the same.

A projection maps the channels of each token by itself. It may return a tuple whose first element is the result, keep
its weight under any name, be called with a keyword, or be a convolution of size one, whose channels come first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

# Private. Seen in torch 2.11 and 2.13; tests/salad_compile/conversion/test_projections.py fails when it moves.
from torch._subclasses.fake_tensor import FakeTensorMode

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def says_its_widths(module: nn.Module) -> bool:
    """Whether this is torch's Linear, or what quantisers and adapters put in its place."""
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    return isinstance(module, nn.Linear) or all(isinstance(size, int) for size in sizes)


def may_project(module: nn.Module) -> bool:
    """Whether a module may turn out to be a projection, by what it holds: its forward tells (:func:`channels`)."""
    return says_its_widths(module) or weight_name(module) is not None


def weight_name(module: nn.Module) -> str | None:
    """Name of the one parameter that is a matrix, of a module without projections inside; None if there is no one.

    A convolution of size one holds a matrix with axes of length one.
    """
    if says_its_widths(module) and isinstance(getattr(module, "weight", None), Tensor):
        return "weight"
    if isinstance(module, _CONVOLUTIONS):
        return "weight" if _is_of_size_one(module) else None
    matrices = [n for n, p in module._parameters.items() if p is not None and p.dim() == 2 and p.is_floating_point()]
    others = any(p.dim() > 1 for n, p in module.named_parameters() if n not in matrices)
    return matrices[0] if len(matrices) == 1 and not others else None


def _is_of_size_one(module: Any) -> bool:
    ones = {*module.kernel_size, *module.stride, *module.dilation, module.groups} == {1}
    return ones and module.padding in ("valid", (0,) * len(module.kernel_size))


def channels(module: nn.Module) -> tuple[int, int] | None:
    """Input and output channels of a projection; None if the module is none.

    A module that does not say them is run, on fake tensors without values.
    """
    if says_its_widths(module):
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
    name = weight_name(module)
    if name is None:
        return None
    if isinstance(module, _CONVOLUTIONS):
        return module.in_channels, module.out_channels
    first, second = module._parameters[name].shape  # type: ignore[union-attr]
    for given, expected in ((second, first), (first, second)):
        if _width_for(module, given) == expected:
            return given, expected
    return None


def _width_for(module: nn.Module, given: int) -> int | None:
    """How many channels the module returns for so many; None if it takes no so many."""
    reference = next(module.parameters())
    try:
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            x = torch.empty(2, 3, given, dtype=reference.dtype, device=reference.device)
            out = result_of(type(module).forward(module, x))
    except Exception:  # whatever the module raises
        return None
    return out.shape[-1] if out is not None and out.shape[:-1] == x.shape[:-1] else None


def fits(module: nn.Module, x: Tensor, out: Tensor) -> bool:
    """Whether a module that does not say its widths may have made `out` of `x`, as :class:`ProjectionCall` has them."""
    if x.dim() < 2 or x.shape[:-1] != out.shape[:-1]:
        return False
    widths = x.shape[-1], out.shape[-1]
    if isinstance(module, _CONVOLUTIONS):
        return widths == (module.in_channels, module.out_channels)
    shape = module._parameters[weight_name(module)].shape  # type: ignore[index,union-attr]
    return widths in (tuple(shape), tuple(shape[::-1]))


@dataclass(frozen=True)
class ProjectionCall:
    """One call of a projection.

    x: what it read, (..., in channels), and out: what it returned, (..., out channels); of a convolution with one axis
    for all places. rebuild: what the module would have returned with another tensor of the shape of `out` as result.
    """

    x: Tensor
    out: Tensor
    rebuild: Callable[[Tensor], Any]


def projection_call(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], returned: Any
) -> ProjectionCall | None:
    """What a forward hook of a projection sees, as tensors with channels last; None if they are no tensors."""
    x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    out = result_of(returned)
    if x is None or out is None:
        return None
    if not isinstance(module, _CONVOLUTIONS):
        return ProjectionCall(x, out, lambda new: _replaced(returned, new))
    shape = out.shape
    return ProjectionCall(_places(x), _places(out), lambda new: _replaced(returned, new.transpose(1, 2).reshape(shape)))


def _places(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def result_of(returned: Any) -> Tensor | None:
    """The tensor that a projection returned, by itself or first of a tuple."""
    first = returned[0] if isinstance(returned, (tuple, list)) and returned else returned
    return first if isinstance(first, Tensor) else None


def _replaced(returned: Any, new: Tensor) -> Any:
    if not isinstance(returned, (tuple, list)):
        return new
    if hasattr(returned, "_replace"):  # a named tuple
        return type(returned)(new, *returned[1:])
    return type(returned)((new, *returned[1:]))


def is_convolution(module: nn.Module) -> bool:
    """Whether this has its channels first."""
    return isinstance(module, _CONVOLUTIONS)


@torch.no_grad()
def holds_outputs_first(module: nn.Module) -> bool | None:
    """Whether a projection is its weight times its input: (out, in) if true, (in, out) if false, None if neither.

    Torch's own modules are known; another one is run on random numbers, without what hooks would change.
    """
    if type(module) is nn.Linear or type(module) in _CONVOLUTIONS:
        return True
    name, widths = weight_name(module), channels(module)
    if name is None or widths is None or is_convolution(module):
        return None
    weight = module._parameters[name]
    if weight is None:
        return None
    x = torch.randn(8, widths[0], generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    try:
        nothing, something = (result_of(type(module).forward(module, given)) for given in (x * 0, x))
    except Exception:  # whatever the module raises
        return None
    if nothing is None or something is None:
        return None
    result = (something - nothing).float()
    bound = 1e-4 if weight.dtype.itemsize >= 4 else 2e-2
    for first, matrix in ((True, weight), (False, weight.T)):
        if matrix.shape == widths[::-1]:
            expected = x.float() @ matrix.float().T
            if (result - expected).norm() <= bound * expected.norm():
                return first
    return None


def laid_out(update: Tensor, weight: Tensor, *, outputs_first: bool) -> Tensor:
    """An update of (out, in) in the shape of the weight that it belongs to."""
    return (update if outputs_first else update.T).reshape(weight.shape)
