"""Which models of this process are converted, so that a graph can be told from one of a model that never was."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable
from typing import Any

import torch.nn as nn

from salad_compile.sites.graph_breaks import attached
from salad_compile.sites.site import Site

_models: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def remember_model(model: nn.Module) -> None:
    """A model whose branches were attached."""
    _models.add(model)


def belongs_to_converted(inputs: Iterable[Any]) -> bool:
    """Whether a graph is part of a converted model; also where that cannot be told.

    Args:
        inputs: of the graph, with the parameters and buffers themselves among them.
    """
    models = list(_models)
    tensors = {id(tensor) for model in models for tensor in itertools.chain(model.parameters(), model.buffers())}
    if any(id(given) in tensors for given in inputs):
        return True
    known = {id(module) for model in models for module in model.modules() if isinstance(module, Site)}
    return any(id(site) not in known for site in attached())  # of a copy: nobody said of which model
