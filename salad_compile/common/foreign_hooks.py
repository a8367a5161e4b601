"""Hooks of accelerate and diffusers, which wrap a module's `forward` on the instance and move its weights.

They offload (accelerate's sequential offload, diffusers' group offload), cast, or cache. Ours go inside of theirs: then
weights are in place when ours run, and removing theirs, which puts back the forward that was there before, leaves ours.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

# Private names. Seen in accelerate 1.15 and diffusers 0.42; tests/trainers/test_offloading.py fails when
# they move. accelerate: the hook of a module and the forward that it wraps. diffusers: the registry of a module's
# hooks, and of each hook what it calls.
_ACCELERATE_HOOK, _ACCELERATE_FORWARD = "_hf_hook", "_old_forward"
_REGISTRY, _REFERENCES = "_diffusers_hook", "_fn_refs"
# Hooks of diffusers without which weights and inputs do not fit each other.
_CASTS = ("layerwise_casting", "peft_autocast_disable")
_PLACEMENT = ("group_offloading", "layer_execution_tracker", "lazy_prefetch_group_offloading")


@dataclass(frozen=True)
class ForwardSlot:
    """Where a module's own `forward` is kept, inside of foreign hooks: an attribute of `holder`."""

    module: nn.Module
    holder: Any
    name: str

    def get(self) -> Callable[..., Any] | None:
        """What is there; None if that is the forward of the module's class."""
        forward: Callable[..., Any] | None = vars(self.holder).get(self.name)
        own = getattr(forward, "__self__", None) is self.module
        return None if own and getattr(forward, "__func__", None) is type(self.module).forward else forward

    def set(self, forward: Callable[..., Any] | None) -> None:
        """Put a forward there; None puts the class's."""
        if forward is None and self.holder is self.module and self.name == "forward":
            self.module.__dict__.pop("forward", None)
        else:
            own = type(self.module).forward.__get__(self.module)
            setattr(self.holder, self.name, own if forward is None else forward)


def forward_slot(module: nn.Module) -> ForwardSlot:
    """Where the innermost forward of a module is kept."""
    slot = ForwardSlot(module, module, "forward")
    while (inner := _inner(slot)) is not None and inner != slot:
        slot = inner
    return slot


def _inner(slot: ForwardSlot) -> ForwardSlot | None:
    module, made_in = slot.module, str(getattr(getattr(slot.get(), "func", None), "__module__", ""))
    if made_in == "accelerate.hooks" and _ACCELERATE_FORWARD in module.__dict__:
        return ForwardSlot(module, module, _ACCELERATE_FORWARD)
    references = getattr(module.__dict__.get(_REGISTRY), _REFERENCES, None)
    if made_in == "diffusers.hooks.hooks" and references:
        first = references[0]
        return ForwardSlot(module, first, "forward" if first.original_forward is None else "original_forward")
    return None


def is_offloaded(module: nn.Module) -> bool:
    """Whether a hook of accelerate keeps the weights of this very module elsewhere."""
    return any(getattr(hook, "offload", False) for hook in _accelerate_hooks(module))


def execution_device(module: nn.Module) -> torch.device | None:
    """Where a module computes whose weights hooks keep elsewhere; None without such hooks."""
    for hook in _accelerate_hooks(module):
        if getattr(hook, "offload", False) and hook.execution_device is not None:
            return _device(hook.execution_device)
    group = module_group(module)
    return None if group is None else torch.device(group.onload_device)


def module_group(module: nn.Module) -> Any:
    """The group of diffusers' group offloading whose hook a module has, or None."""
    registry = module.__dict__.get(_REGISTRY)
    hook = None if registry is None else registry.get_hook("group_offloading")
    return None if hook is None else hook.group


def _device(device: Any) -> torch.device:
    # accelerate numbers accelerators
    if not isinstance(device, int):
        return torch.device(device)
    accelerator = torch.accelerator.current_accelerator()
    return torch.device("cpu" if accelerator is None else accelerator.type, device)


def _accelerate_hooks(module: nn.Module) -> list[Any]:
    hook = module.__dict__.get(_ACCELERATE_HOOK)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


def stored(model: nn.Module, module: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """The parameter or buffer `name` of a module of `model` with its values, also while hooks keep them elsewhere.

    Writing into the result changes the model, unless :func:`is_on_disk`.
    """
    for hook in _accelerate_hooks(module):
        if tensor.device.type == "meta" and getattr(hook, "offload", False) and hook.weights_map is not None:
            held: Tensor = hook.weights_map[name]
            return held
    group = _disk_group(model, tensor)
    if group is None:
        return tensor
    from safetensors import safe_open

    with safe_open(group.safetensors_file_path, framework="pt") as file:
        read: Tensor = file.get_tensor(group.tensor_to_key[tensor])
    return read


def is_on_disk(model: nn.Module, module: nn.Module, name: str, tensor: Tensor) -> bool:
    """Whether hooks keep the values of the tensor in a file."""
    if _disk_group(model, tensor) is not None:
        return True
    held = (stored(model, module, name, tensor) for _ in range(2))  # read from a file, each time anew
    return is_offloaded(module) and next(held) is not next(held)


def _disk_group(model: nn.Module, tensor: Tensor) -> Any:
    for module in model.modules():
        group = module_group(module)
        on_disk = group is not None and group.offload_to_disk_path is not None and group._is_offloaded_to_disk
        if on_disk and tensor in group.tensor_to_key:
            return group
    return None


@contextlib.contextmanager
def without_foreign_hooks(model: nn.Module, *, keep_placement: bool) -> Iterator[None]:
    """Every module without its foreign hooks, but for casts, and for those that move weights if they are to be kept."""
    undo: list[Callable[[], None]] = []
    try:
        for module in model.modules():
            for hook in [] if keep_placement else _accelerate_hooks(module):
                undo.append(_replace(hook, pre_forward=_pass_arguments, post_forward=_pass_result))
            registry = module.__dict__.get(_REGISTRY)
            names, references = getattr(registry, "_hook_order", ()), getattr(registry, _REFERENCES, ())
            for name, reference in zip(names, references, strict=True):
                if name in _CASTS or (keep_placement and name in _PLACEMENT):
                    continue
                changes: dict[str, Any] = {"pre_forward": _pass_arguments, "post_forward": _pass_result}
                if reference.original_forward is not None:
                    changes["forward"] = reference.original_forward
                undo.append(_replace(reference, **changes))
        yield
    finally:
        for restore in reversed(undo):
            restore()


def _replace(holder: Any, **values: Any) -> Callable[[], None]:
    before = dict(vars(holder))
    vars(holder).update(values)

    def restore() -> None:
        for name in values:
            if name in before:
                vars(holder)[name] = before[name]
            else:
                del vars(holder)[name]

    return restore


def _pass_arguments(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, kwargs


def _pass_result(module: nn.Module, output: Any) -> Any:
    return output
