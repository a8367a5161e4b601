"""Which operations keep the tokens of a value where they are, and which tokens their results have.

Element by element (whatever torch itself tags as pointwise), along the channels (norms, products with a weight), over
axes in which nothing changes (sums, means). Of no other operation is it taken for granted, whatever shape its result
has: a sort keeps the shape as well.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from salad_compile.common.torch_calls import argument_of
from salad_compile.position.shadows import ELSEWHERE, SEVERAL, UnknownError, compact, equal

Lookup = Callable[[Any], "Tensor | None"]


class Entries:
    """How entries of shadows become one where values are combined: of rows, that are the same row or several."""

    blank = ELSEWHERE

    def merge(self, one: Tensor, other: Tensor) -> Tensor:
        """Entry by entry, of two shadows that can be broadcast."""
        both = torch.where(one == other, one, torch.tensor(SEVERAL))
        return torch.where(one == ELSEWHERE, other, torch.where(other == ELSEWHERE, one, both))

    def reduce(self, shadow: Tensor, axes: Sequence[int]) -> Tensor:
        """Of all entries along some axes, which stay, with one entry each."""
        axes = tuple(axes)
        if not axes:
            return shadow
        highest = shadow.amax(axes, keepdim=True)
        lowest = torch.where(shadow == ELSEWHERE, highest, shadow).amin(axes, keepdim=True)
        return torch.where(lowest == highest, highest, torch.tensor(SEVERAL))

    def convolve(self, shadow: Tensor, operation: Operation) -> Tensor:
        """Of a convolution: over axes whose sizes stay, each place is still the place."""
        name, shape = operation.name, operation.shape
        axes = int(name[4:5]) if name[4:5].isdigit() else len(shape) - 2
        if tuple(shadow.shape[-axes:]) != tuple(shape[-axes:]):
            raise UnknownError(f"{name} is not known to keep tokens where they are")
        return _reduced_axis(shadow, -axes - 1, self)


@dataclass(frozen=True)
class Operation:
    """One operation whose operands have shadows.

    Attributes:
        name: see `name_of`. lookup: the shadow of an argument, or None. shadows: all of them. shape: of the result.
    """

    name: str
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    lookup: Lookup
    shadows: Sequence[Tensor]
    shape: Sequence[int]


def carry(operation: Operation, entries: Entries) -> Tensor:
    """The shadow of a result that is computed in place of the operands' tokens.

    Raises:
        UnknownError: the operation may move them.
    """
    name, shape = operation.name, tuple(operation.shape)
    shadows: Sequence[Tensor]
    chooses = name in ("max", "min") and len(operation.args) > 1 and not isinstance(operation.args[1], int)
    if is_pointwise(name) or chooses:
        shadows = operation.shadows
    elif name in _ALONG_CHANNELS:
        if any(tuple(shadow.shape) != shape for shadow in operation.shadows):
            raise UnknownError(f"{name} is not known to keep tokens where they are")
        shadows = operation.shadows
    elif name in _REDUCTIONS:
        shadows = [_reduced(operation, entries)]
    elif name in _PRODUCTS:
        shadows = _products(operation, entries)
    elif name in _CONVOLUTIONS:
        shadows = [_convolved(operation, entries)]
    else:
        raise UnknownError(f"{name} is not known to keep tokens where they are")
    if not shadows or not all(_broadcasts(tuple(shadow.shape), shape) for shadow in shadows):
        raise UnknownError(f"{name} is not known to keep tokens where they are")
    return merged(shadows, entries).expand(shape)


def merged(shadows: Sequence[Tensor], entries: Entries) -> Tensor:
    """One shadow from those of several operands."""
    result = shadows[0]
    for other in shadows[1:]:
        if result.shape == other.shape and equal(result, other):
            continue
        shape = torch.broadcast_shapes(result.shape, other.shape)  # type: ignore[no-untyped-call]
        result = entries.merge(compact(result), compact(other)).expand(shape)
    return result


@functools.cache
def is_pointwise(name: str) -> bool:
    """Whether torch says so of the operator of this name, or of the one that Python's operator stands for."""
    known = {name, _PYTHON.get(name, name)}
    known |= {_PYTHON.get(name[1:], name[1:])} if name[:1] in ("r", "i") else set()
    if known & _POINTWISE:
        return True
    packets = [getattr(torch.ops.aten, other, None) for other in known]
    return any(
        torch.Tag.pointwise in getattr(packet, overload).tags
        for packet in packets
        if isinstance(packet, torch._ops.OpOverloadPacket)
        for overload in packet.overloads()  # type: ignore[no-untyped-call]
    )


def _broadcasts(own: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    tail = shape[len(shape) - len(own) :]
    return len(own) <= len(shape) and all(size in (1, other) for size, other in zip(own, tail, strict=True))


def _reduced(operation: Operation, entries: Entries) -> Tensor:
    args, kwargs = operation.args, operation.kwargs
    value = args[0] if args else kwargs.get("input")
    shadow = operation.lookup(value)
    if shadow is None:
        raise UnknownError(f"{operation.name} has another operand than expected")
    at = _REDUCTIONS[operation.name]
    axes = argument_of(args, kwargs, at, "dim")
    if axes is None or isinstance(axes, bool):
        axes = tuple(range(shadow.dim()))
    axes = [axis % shadow.dim() for axis in (axes if isinstance(axes, (tuple, list)) else (axes,))]
    result = entries.reduce(compact(shadow), axes)
    sizes = [1 if axis in axes else size for axis, size in enumerate(shadow.shape)]
    result = result.expand(sizes)
    return result if len(operation.shape) == len(sizes) else result.squeeze(tuple(axes))


def _products(operation: Operation, entries: Entries) -> list[Tensor]:
    """The shadows of the operands of a product, without the axis over which it sums."""
    args = [*operation.args, *(operation.kwargs[key] for key in _OPERANDS if key in operation.kwargs)]
    if operation.name == "einsum":
        return _einsum(args, operation, entries)
    added = args[:1] if operation.name in ("addmm", "baddbmm") else []
    left, right, *_ = args[len(added) :]
    shadows = [shadow for shadow in map(operation.lookup, added) if shadow is not None]
    one, other = operation.lookup(left), operation.lookup(right)
    if one is not None and other is not None:
        raise UnknownError(f"{operation.name} of two of its values")
    if one is not None:
        if one.dim() < 2:
            raise UnknownError(f"{operation.name} of one vector")
        shadows.append(_reduced_axis(one, -1, entries))
    if other is not None:
        if operation.name == "linear" or other.dim() < 2:
            raise UnknownError("a weight is computed from its tokens")
        shadows.append(_reduced_axis(other, -2, entries))
    if len(shadows) < len(operation.shadows):
        raise UnknownError(f"{operation.name} has another operand than expected")
    return [shadow if len(operation.shape) == shadow.dim() else shadow.squeeze(-1) for shadow in shadows]


def _reduced_axis(shadow: Tensor, axis: int, entries: Entries) -> Tensor:
    axis %= shadow.dim()
    sizes = list(shadow.shape)
    sizes[axis] = 1
    return entries.reduce(compact(shadow), [axis]).expand(sizes)


def _einsum(args: Sequence[Any], operation: Operation, entries: Entries) -> list[Tensor]:
    equation, *operands = args
    operands = list(operands[0]) if len(operands) == 1 and isinstance(operands[0], (tuple, list)) else operands
    inputs, arrow, out = str(equation).replace(" ", "").partition("->")
    subscripts = inputs.split(",")
    known = [(operation.lookup(operand), letters) for operand, letters in zip(operands, subscripts, strict=True)]
    found = [(shadow, _spelt_out(letters, shadow.dim())) for shadow, letters in known if shadow is not None]
    out = _spelt_out(out, len(operation.shape))
    if not arrow or any(len(set(letters)) != len(letters) for letters in (out, *(letters for _, letters in found))):
        raise UnknownError(f"an einsum of {equation!r}")
    shadows = []
    for shadow, letters in found:
        gone = [at for at, letter in enumerate(letters) if letter not in out]
        sizes = [1 if at in gone else size for at, size in enumerate(shadow.shape)]
        left = entries.reduce(compact(shadow), gone).expand(sizes).squeeze(tuple(gone)) if gone else shadow
        kept = [letter for letter in letters if letter in out]
        left = left.permute([kept.index(letter) for letter in out if letter in kept])
        shadows.append(left[tuple(slice(None) if letter in kept else None for letter in out)])
    return shadows


def _spelt_out(letters: str, axes: int) -> str:
    """Subscripts with letters of no alphabet for an ellipsis."""
    named = len(letters.replace("...", ""))
    return letters.replace("...", "0123456789"[10 - (axes - named) :] if axes > named else "")


def _convolved(operation: Operation, entries: Entries) -> Tensor:
    shadow = operation.lookup(operation.args[0] if operation.args else operation.kwargs.get("input"))
    if shadow is None or len(operation.shadows) > 1:
        raise UnknownError(f"{operation.name} of other values")
    return entries.convolve(shadow, operation)


_OPERANDS = ("input", "mat1", "batch1", "other", "mat2", "batch2", "weight", "operands")
_PRODUCTS = frozenset({"linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum"})
_CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d", "convolution"})
# Where the axes stand among the arguments.
_REDUCTIONS = {
    **dict.fromkeys(("sum", "mean", "prod", "amax", "amin", "all", "any", "logsumexp", "std", "var", "median"), 1),
    **dict.fromkeys(("max", "min", "std_mean", "var_mean", "count_nonzero", "nansum", "nanmean"), 1),
    **dict.fromkeys(("norm", "vector_norm", "linalg_vector_norm", "linalg_norm"), 2),
}
_CHANNELS = (
    "layer_norm rms_norm group_norm batch_norm instance_norm normalize softmax log_softmax softmin local_response_norm "
    "native_layer_norm fused_rms_norm"
)
_ALONG_CHANNELS = frozenset(_CHANNELS.split())
# What torch's operators of these names do not say of themselves.
_ELEMENTS = (
    "floor_divide divide subtract multiply floordiv hardswish prelu rrelu dropout native_dropout alpha_dropout "
    "feature_alpha_dropout feature_dropout dropout1d dropout2d dropout3d polar complex conj real imag to to_copy copy "
    "fill data type type_as float double half bfloat16 int long short bool char byte cfloat cdouble clone contiguous "
    "alias detach lift_fresh resolve_conj resolve_neg convert_element_type requires_grad retain_grad cpu cuda "
    "pin_memory where masked_fill view"
)
_POINTWISE = frozenset(_ELEMENTS.split())
_PYTHON = {
    "truediv": "div",
    "floordiv": "floor_divide",
    "mod": "remainder",
    "and": "bitwise_and",
    "or": "bitwise_or",
    "xor": "bitwise_xor",
    "invert": "bitwise_not",
    "not": "logical_not",
    "pos": "positive",
    "lshift": "bitwise_left_shift",
    "rshift": "bitwise_right_shift",
}
