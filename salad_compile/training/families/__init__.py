"""How the transformers of each family of models are called in training; one file for each.

A family is recognised by the arguments of its forward, so copies and descendants of a class are found too. One that
takes further conditions, as Wan-Animate does, is of no family, because it would be trained without them. Other models
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
from salad_compile.training.families.wan import Wan, WanVACE
from salad_compile.training.flow_matching import Forward
from salad_compile.training.settings import TrainSettings

__all__ = ["FAMILIES", "Family", "OwnForward", "family_of"]

FAMILIES: tuple[type[Family], ...] = (LTXVideo, HunyuanVideo, CogVideoX, WanVACE, Wan)

# Optional arguments that their own pipelines leave out too
_SPARE = frozenset({"attention_kwargs", "joint_attention_kwargs", "timestep_cond", "ofs", "video_coords", "fps"})


def family_of(model: nn.Module, settings: TrainSettings, forward: Forward | None = None) -> Family:
    """The family whose arguments the model's forward takes, or the user's own forward.

    Raises:
        ConfigError: it is of none of them, or takes further conditions.
    """
    if forward is not None:
        return OwnForward(model, settings, forward)
    parameters = inspect.signature(model.forward).parameters
    named = {name: p.default for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD}
    required = {name for name, default in named.items() if default is inspect.Parameter.empty}
    more: list[str] = []
    for family in FAMILIES:
        given = {*family.needed, *family.known}
        if set(family.needed) <= set(parameters) and required <= given:
            more = [name for name, default in named.items() if default is None and name not in given | _SPARE]
            if not more:
                return family(model, settings)
            break
    said = f", and nothing here gives it {', '.join(more)}" if more else ""
    raise ConfigError(
        f"the forward of {type(model).__name__} takes {', '.join(parameters)}: it is not called as those of Wan, "
        f"LTX-Video, HunyuanVideo or CogVideoX are{said}. Pass train(..., forward=f), where f(model, latents, "
        "timesteps, texts[, conditions]) returns the predicted velocity, noise minus clean latents."
    )
