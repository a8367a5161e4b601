"""Tell, once for each model, that a training run trains nothing of SALAD, because somebody froze its branches.

The adapter verbs of diffusers and peft (`load_lora_weights`, `add_adapter`) set `requires_grad=False` on every
parameter of a model, and unloading the adapter does not set it back.

Uncompiled, a site looks when it runs. Compiled, the backend looks when it gets a graph, so that nothing of this is
traced and no guard is added: Dynamo compiles again when `requires_grad` or the grad mode changes. What it does not
notice is that a model which ran frozen in eval mode, with gradients enabled, goes over to training mode.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch

from salad_compile.common.logs import logger
from salad_compile.sites import graph_breaks
from salad_compile.sites.site import DenseSwitch, Site

# One switch for each model: those that were told of, or that are frozen on purpose.
_settled: weakref.WeakSet[DenseSwitch] = weakref.WeakSet()


def settle(site: Site, settled: bool) -> None:
    """Say nothing of this site's model, or look again."""
    (_settled.add if settled else _settled.discard)(site.switch)


def tell_of_inputs(inputs: Iterable[Any]) -> None:
    """:func:`tell`, of the sites whose tensors are among the inputs of a graph that is about to be compiled."""
    if torch.is_grad_enabled():
        marks = {id(tensor) for tensor in inputs}
        for site in graph_breaks.attached():
            if id(site.mark) in marks:
                tell(site)


def tell(site: Site) -> None:
    """Warn if this site is in training mode, gradients are enabled, and no site of its model can be trained."""
    if not site.training or not torch.is_grad_enabled() or site.switch in _settled:
        return
    if any(parameter.requires_grad for parameter in site.parameters()):
        return
    alike = [other for other in graph_breaks.attached() if other.switch is site.switch]
    parameters = [parameter for other in alike for parameter in other.parameters()]
    if not parameters or any(parameter.requires_grad for parameter in parameters):
        return
    settle(site, True)
    logger.warning(
        "nothing of SALAD is being trained: the model is in training mode with gradients enabled, and every parameter "
        "of its %d converted sites (%s, ...) is frozen. Adapter verbs such as load_lora_weights and add_adapter freeze "
        "all parameters of a model. salad_compile.set_trainable(model) makes the branches trainable again; "
        "set_trainable(model, False) says that it is meant so.",
        len(alike),
        min(other.record.owner for other in alike) or "the model itself",
    )
