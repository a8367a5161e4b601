"""How the transformers of each family of models are called in training; one file for each.

A family is recognised by the arguments of its forward, so copies and descendants of a class are found too. Other models
train with a forward of the user's.
"""

from __future__ import annotations

import inspect

import torch.nn as nn

from salad_compile.errors import ConfigError
from salad_compile.training.families.cogvideox import CogVideoX
from salad_compile.training.families.family import Family, OwnForward
from salad_compile.training.families.hunyuan_video import HunyuanVideo
from salad_compile.training.families.ltx import LTXVideo
from salad_compile.training.families.wan import Wan
from salad_compile.training.flow_matching import Forward
from salad_compile.training.settings import TrainSettings

__all__ = ["FAMILIES", "Family", "OwnForward", "family_of"]

FAMILIES: tuple[type[Family], ...] = (LTXVideo, HunyuanVideo, CogVideoX, Wan)


def family_of(model: nn.Module, settings: TrainSettings, forward: Forward | None = None) -> Family:
    """The family whose arguments the model's forward takes, or the user's own forward.

    Raises:
        ConfigError: it is of none of them.
    """
    if forward is not None:
        return OwnForward(model, settings, forward)
    parameters = inspect.signature(model.forward).parameters
    required = {name for name, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    for family in FAMILIES:
        if set(family.needed) <= set(parameters) and required <= {*family.needed, *family.known}:
            return family(model, settings)
    raise ConfigError(
        f"the forward of {type(model).__name__} takes {', '.join(parameters)}: it is not called as those of Wan, "
        "LTX-Video, HunyuanVideo or CogVideoX are. Pass train(..., forward=f), where f(model, latents, timesteps, "
        "texts[, conditions]) returns the predicted velocity, noise minus clean latents."
    )
