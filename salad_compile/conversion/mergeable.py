"""Which projections a low-rank update can be merged into, decided before anything is written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from salad_compile.common.foreign_hooks import is_on_disk
from salad_compile.common.projections import holds_outputs_first, weight_name
from salad_compile.errors import MergeError
from salad_compile.sites.branch import SaladBranch


@dataclass(frozen=True)
class Mergeable:
    """A projection with a low-rank update: its name and module, its roles in `branch`, and its weight.

    outputs_first: whether the weight is (out, in); else it is (in, out).
    """

    branch: SaladBranch
    name: str
    module: nn.Module
    roles: tuple[str, ...]
    weight_name: str
    outputs_first: bool

    @property
    def weight(self) -> nn.Parameter:
        """The parameter itself."""
        weight = self.module._parameters[self.weight_name]
        assert weight is not None
        return weight

    @property
    def columns(self) -> int:
        """How many input channels it has."""
        return self.weight.numel() // self.weight.shape[0 if self.outputs_first else 1]

    @property
    def key(self) -> str:
        """The name of the weight in the state dict of the model."""
        return f"{self.name}.{self.weight_name}"


def mergeable(model: nn.Module, branch: SaladBranch, *, dequantise: bool = False) -> Iterator[Mergeable]:
    """Each projection with a low-rank update. Raises MergeError."""
    for first, roles in branch.record.shared_roles().items():
        if not any(role in branch.lora_roles for role in roles):
            continue
        name = branch.record.projections()[first]
        module = model.get_submodule(name)
        held = weight_name(module)
        if reason := _fault(model, module, held, dequantise=dequantise):
            raise MergeError(f"{name!r} {reason}.")
        outputs_first = holds_outputs_first(module)
        if held is None or outputs_first is None:
            raise MergeError(f"{name!r} {_no_product(module)}.")
        yield Mergeable(branch, name, module, roles, held, outputs_first)


def _no_product(module: nn.Module) -> str:
    return (
        f"is a {type(module).__name__}, which is not simply the product of one floating-point parameter and its input. "
        "Dequantise, or unload the other adapter, first"
    )


def _fault(model: nn.Module, module: nn.Module, held: str | None, *, dequantise: bool) -> str:
    """Why an update cannot be merged into the weight of a module, or the empty string."""
    weight = module._parameters.get(held or "")
    if weight is None:
        return _no_product(module)
    if weight.device.type == "meta" or is_on_disk(model, module, held or "", weight):
        return "has its weight elsewhere (offloaded, or on the meta device): merge before offloading"
    if is_subclass(weight):
        kind = type(weight.data).__name__
        if not dequantise:
            return f"has a weight of the class {kind} (quantised?): pass dequantise=True, or merge before quantising"
        return _dequantising_fault(weight, kind)
    if weight.dtype.itemsize < 2 or not weight.is_floating_point():
        return f"has a weight of {weight.dtype}: merge in 16 or 32 bits"
    return ""


def is_subclass(weight: Tensor) -> bool:
    """Whether a weight is a tensor subclass other than a shard: what is written into it may be rounded, or lost."""
    kind = type(weight.data)
    return kind is not Tensor and kind.__name__ != "DTensor"


def _dequantising_fault(weight: Tensor, kind: str) -> str:
    try:
        dense = dequantised(weight)
    except Exception as error:  # whatever the subclass raises
        return f"has a weight of the class {kind}, which cannot be dequantised: {type(error).__name__}: {error}"
    fits = type(dense) is Tensor and dense.shape == weight.shape and dense.is_floating_point()
    return "" if fits else f"has a weight of the class {kind}, whose dequantize() gives no plain tensor of its shape"


def dequantised(weight: Tensor) -> Tensor:
    """The dense values of a quantised weight, in the dtype that it shows; detached."""
    with torch.no_grad():
        dense: Any = weight.dequantize()
        return dense.detach().to(weight.dtype)  # type: ignore[no-any-return]


def require_untied(model: nn.Module, names: list[str]) -> None:
    """Check that nothing else in a model uses these weights of projections.

    Raises:
        MergeError: something does, and would get an update that is not its own. Bits count, not objects: views too.
    """
    spans = [
        (*_span(parameter), name)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.device.type != "meta" and type(parameter.data) is Tensor and parameter.numel()
    ]
    own = set(names)
    spans.sort()
    reach: tuple[str, int, int, str] | None = None  # the span so far that ends last
    for device, start, end, name in spans:
        if reach is not None and reach[0] == device and start < reach[2] and own & {name, reach[3]}:
            first, second = (name, reach[3]) if name in own else (reach[3], name)
            raise MergeError(
                f"{first!r} shares its memory with {second!r}: the update belongs to one of them, and merging it would "
                "change both. Untie them first (module.weight = torch.nn.Parameter(module.weight.detach().clone()))."
            )
        if reach is None or reach[0] != device or end > reach[2]:
            reach = device, start, end, name


def _span(tensor: Tensor) -> tuple[str, int, int]:
    """Device, and the addresses of the first byte and behind the last one; of strided views what they span."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return str(tensor.device), start, start + (last + 1) * tensor.element_size()
