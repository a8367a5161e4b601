"""ComfyUI's ModelPatcher, by its public methods: where the diffusion model is, and another in its place.

All clones of a MODEL share one module, and ComfyUI writes the weights that LoRA change into it while a clone is in use.
So a clone that shall compute otherwise gets a copy of the module's structure, with the same parameters, as an object
patch: ComfyUI puts it in place when that clone is used, changes and moves its weights as it does with others, and
takes it out again.
"""

from __future__ import annotations

import copy
import uuid
from typing import Any

import torch
import torch.nn as nn

from salad_compile.errors import ConfigError
from salad_compile.sites.branch import SaladBranch, branches

PLACE = "diffusion_model"
# Where ComfyUI keeps that a node has compiled the model; its wrapper would put the module it knows in ours's place.
_COMPILED = "torch_compile_kwargs"


def diffusion_model_of(model: Any) -> nn.Module:
    """The module that this MODEL computes with. Raises ConfigError if it has none."""
    try:
        found = model.get_model_object(PLACE)
    except AttributeError:
        found = None
    if not isinstance(found, nn.Module):
        raise ConfigError("this MODEL has no diffusion model: connect the output of a loader of diffusion models.")
    return found


def salad_in(model: Any) -> nn.Module | None:
    """The converted diffusion model of a MODEL, or None."""
    patch = model.object_patches.get(PLACE)
    return patch if isinstance(patch, nn.Module) and branches(patch) else None


def require_unpatched(model: Any) -> None:
    """Raises ConfigError where another node's module would take the place of ours, or ours that of another."""
    ours = salad_in(model)
    for name, patch in model.object_patches.items():
        if (name == PLACE and patch is not ours) or name.startswith(f"{PLACE}."):
            raise ConfigError(f"another node has replaced {name!r} of this MODEL: put the SALAD nodes before it.")
    if _COMPILED in model.model_options:
        raise ConfigError("this MODEL is compiled already: take that node out, and use Compile with SALAD.")


def release(model: Any) -> tuple[Any, nn.Module]:
    """A clone with its weights as they were loaded, and a copy of its diffusion model that shares them.

    A MODEL that was just in use has the weights of its LoRA in place; a copy made then would keep them for good.
    """
    is_dynamic = getattr(model, "is_dynamic", None)
    # Dynamic loading keeps its books for each module, and the copy would not be in them. ComfyUI's own node that
    # compiles turns it off in the same way.
    patched = model.clone(disable_dynamic=True) if is_dynamic is not None and is_dynamic() else model.clone()
    patched.detach()
    return patched, copy_structure(diffusion_model_of(patched))


def copy_structure(model: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers are those of `model`, but for the buffers that settings write."""
    shared: list[torch.Tensor] = list(model.parameters())
    for module in model.modules():
        if not isinstance(module, SaladBranch):
            shared += module.buffers(recurse=False)
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def use_instead(patched: Any, module: nn.Module) -> None:
    """Let a clone compute with `module`."""
    patched.add_object_patch(PLACE, module)
    # ComfyUI does not write weights again for a clone with the same patches: these are to be written into other modules
    patched.patches_uuid = uuid.uuid4()
    if getattr(patched, "size", 0):
        base = {id(p) for p in patched.model.parameters()}
        patched.size += sum(p.numel() * p.element_size() for p in module.parameters() if id(p) not in base)


def weights_dtype(patched: Any) -> torch.dtype:
    """In which ComfyUI will compute, whatever the weights are stored in."""
    dtype = getattr(patched.model, "get_dtype_inference", lambda: None)()
    if isinstance(dtype, torch.dtype):
        return dtype
    wide = (p.dtype for p in patched.model.parameters() if p.is_floating_point() and p.dtype.itemsize > 1)
    return next(wide, torch.float32)
