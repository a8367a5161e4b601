"""Where the parameters of a branch lie: where those of its site lie, and moved by the same hooks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn

from salad_compile.common.foreign_hooks import execution_device, is_offloaded, module_group
from salad_compile.errors import WrappedModelError
from salad_compile.sites.branch import SaladBranch


def branch_placement(projection: nn.Module, owner: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype for a branch: those of the projection, or a trainable dtype when its storage is quantised."""
    parameters: list[torch.Tensor] = [*projection.parameters(), *projection.buffers()]
    parameters = parameters or list(owner.parameters())  # the input projection of an nn.MultiheadAttention has none
    device = parameters[0].device if parameters else torch.device("cpu")
    if device.type == "meta" and any(is_offloaded(module) for module in (*projection.modules(), owner)):
        device = torch.device("cpu")  # accelerate holds the weights, on the CPU or on disk
    dtypes = [p.dtype for p in parameters if p.is_floating_point() and p.dtype.itemsize > 1]
    return device, dtypes[0] if dtypes else torch.float32


def require_joinable(model: nn.Module) -> None:
    """Check that the hooks of a model can take more weights.

    Raises:
        WrappedModelError: group offloading with streams pins the weights that were there when it was turned on.
    """
    for name, module in model.named_modules():
        group = module_group(module)
        if group is not None and group.stream is not None:
            raise WrappedModelError(
                f"{name!r} is offloaded with streams (group offloading, use_stream=True), which takes "
                "no more weights: convert or load first, then offload."
            )


def join_hooks(model: nn.Module, branch: SaladBranch, projection: nn.Module) -> None:
    """Let the hooks that move the weights of a site move those of its branch, which is attached, too."""
    offloading = next((module for module in projection.modules() if is_offloaded(module)), None)
    if offloading is not None:
        from accelerate.hooks import attach_align_device_hook  # type: ignore[import-untyped]

        attach_align_device_hook(branch, execution_device=execution_device(offloading), offload=True)
        return
    groups = _groups(model)
    if not groups or any(_takes(group, branch) for group in groups):
        return
    from diffusers.hooks.group_offloading import apply_group_offloading

    group = groups[0]

    apply_group_offloading(branch, group.onload_device, group.offload_device, offload_type="leaf_level")


def _groups(model: nn.Module) -> list[Any]:
    return [group for module in model.modules() if (group := module_group(module)) is not None]


def _takes(group: Any, branch: SaladBranch) -> bool:
    """Whether a group moves whatever its modules hold, and this branch is in one of them."""
    in_memory = group.offload_to_disk_path is None
    return in_memory and any(branch in set(member.modules()) for member in group.modules)
