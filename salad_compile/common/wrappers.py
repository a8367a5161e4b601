"""Names of modules: pipelines, wrappers, and the prefixes that wrappers put into names."""

from __future__ import annotations

from typing import Any

import torch.nn as nn

from salad_compile.errors import ConfigError, WrappedModelError

# Components of a diffusers pipeline that hold a video DiT; Wan 2.2 has two experts.
PIPELINE_COMPONENTS = ("transformer", "transformer_2")

# What torch.compile, DDP, FSDP1 and the activation checkpoint wrapper put into parameter names.
WRAPPER_PREFIXES = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "module.")

# What peft's layers, and those of other libraries that follow it, call the layer that they wrap.
_BASE_LAYER = "base_layer"


def components(model: Any) -> dict[str, nn.Module]:
    """The modules to work on: {"": model}, or a pipeline's transformers under their own names.

    Raises:
        WrappedModelError: the model is wrapped; conversion comes before wrapping.
        ConfigError: neither a module nor a pipeline with a transformer.
    """
    return {name: _require_bare(module) for name, module in _modules(model).items()}


def bare_components(model: Any) -> dict[str, nn.Module]:
    """:func:`components`, of a model, or of a pipeline's models, that may be wrapped by now. Raises ConfigError."""
    return {name: unwrap(module) for name, module in _modules(model).items()}


def _modules(model: Any) -> dict[str, nn.Module]:
    if isinstance(model, nn.Module):
        return {"": model}
    found = {name: getattr(model, name, None) for name in PIPELINE_COMPONENTS}
    modules = {name: module for name, module in found.items() if isinstance(module, nn.Module)}
    if not modules:
        raise ConfigError(
            f"expected a torch.nn.Module or a diffusers pipeline with a `transformer`, got {type(model).__name__}."
        )
    return modules


def single_model(model: Any, verb: str) -> nn.Module:
    """The one module behind `model`, through torch.compile and DDP wrappers; a pipeline must be taken apart."""
    if not isinstance(model, nn.Module):
        names = ", ".join(f"pipe.{name}" for name in components(model))
        raise ConfigError(f"{verb} works on one model at a time: pass {names} to it.")
    return unwrap(model)


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside torch.compile, DistributedDataParallel and FSDP1 wrappers."""
    while True:
        inner = _unwrap_once(model)
        if inner is None:
            return model
        model = inner


def _unwrap_once(model: nn.Module) -> nn.Module | None:
    if type(model).__name__ == "OptimizedModule":
        return model._modules["_orig_mod"]
    if type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
        return model._modules["module"]
    if type(model).__name__ == "FullyShardedDataParallel":
        return model._modules["_fsdp_wrapped_module"]
    return None


def _require_bare(model: nn.Module) -> nn.Module:
    if _unwrap_once(model) is not None:
        raise WrappedModelError(
            f"the model is already wrapped in {type(model).__name__}. Convert first, then compile, shard or "
            "distribute: model = salad_compile.convert(model); model = torch.compile(model, backend='salad')."
        )
    return model


def base_layer(module: nn.Module) -> nn.Module:
    """The layer inside the wrappers of adapters (peft's): what is left when the adapter is unloaded."""
    while isinstance(inner := module._modules.get(_BASE_LAYER), nn.Module):
        module = inner
    return module


def without_base_layer(name: str) -> str:
    """The name that a layer has when no adapter wraps it."""
    while name.endswith(f".{_BASE_LAYER}"):
        name = name.removesuffix(f".{_BASE_LAYER}")
    return name


def plain_key(key: str) -> str:
    """A parameter's name without what wrappers put into it, wherever in the name they put it."""
    for prefix in WRAPPER_PREFIXES[:-1]:
        key = key.replace(prefix, "")
    return key.removeprefix("module.")
