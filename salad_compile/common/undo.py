"""Changes to a model that are taken back if they do not all come about."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn as nn


@contextlib.contextmanager
def unchanged_on_failure(model: nn.Module) -> Iterator[contextlib.ExitStack]:
    """Whatever is raised within, an interruption too, the model's modules are again what they were.

    That is their attributes, submodules, parameters and hooks, and what requires gradients; not the values of tensors.
    The block is given a stack for those: `undo.callback(...)` is called on failure alone.
    """
    modules = [(module, dict(vars(module)), _dictionaries(module)) for module in model.modules()]
    training = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    undo = contextlib.ExitStack()
    try:
        yield undo
    except BaseException:
        with torch.no_grad():
            undo.close()
        for module, attributes, dictionaries in modules:
            vars(module).clear()
            vars(module).update(attributes)
            for key, entries in dictionaries.items():
                attributes[key].clear()
                attributes[key].update(entries)
        for parameter, required in training:
            if parameter.requires_grad != required:
                parameter.requires_grad_(required)
        raise


def _dictionaries(module: nn.Module) -> dict[str, dict[Any, Any]]:
    """Copies of a module's plain dictionaries: parameters, buffers, submodules, hooks."""
    return {key: dict(value) for key, value in vars(module).items() if type(value) in (dict, OrderedDict)}
