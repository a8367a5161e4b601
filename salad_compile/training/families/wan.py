"""Wan 2.1 and 2.2, text to video and image to video, and models that are called like them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn as nn
from torch import Tensor

from salad_compile.errors import ConfigError
from salad_compile.latents import LatentDataset, LatentItem
from salad_compile.latents.conditions import conditions_of
from salad_compile.latents.item import CLIP_FEATURE, LATENTS_IMAGE, VACE_CONTEXT
from salad_compile.training.families.family import Family, token_timesteps
from salad_compile.training.flow_matching import Noised

_FEATURE = "encoder_hidden_states_image"  # how Wan's forward calls the features of the image encoder


class Wan(Family):
    """Flow matching; texts padded with zeros and without a mask.

    Image-to-video models take a mask and the first frame, encoded with empty frames behind it, as further channels.
    TI2V models take a first frame in the place of a noisy one (`first_frame_conditioning_p`); else they are trained as
    for text to video, with the timestep of the sample for every token.
    """

    needed: ClassVar[tuple[str, ...]] = ("hidden_states", "timestep", "encoder_hidden_states", "return_dict")
    known: ClassVar[tuple[str, ...]] = (_FEATURE,)
    text_width: ClassVar[str] = "text_dim"
    takes_first_frame: ClassVar[bool] = True

    def inputs(self, batch: Noised) -> dict[str, Any]:
        latents, conditions = batch.latents, batch.conditions
        takes = taken_conditions(self.model, latents.shape[1])
        if LATENTS_IMAGE in takes:
            latents = torch.cat([latents, conditions[LATENTS_IMAGE]], dim=1)
        more = {_FEATURE: _features(conditions[CLIP_FEATURE])} if CLIP_FEATURE in takes else {}
        timesteps = batch.timesteps
        if self.settings.first_frame_conditioning_p:
            timesteps = token_timesteps(batch, tuple(self.config.patch_size))
        return {"hidden_states": latents, "timestep": timesteps, "encoder_hidden_states": batch.texts, **more}

    def check(self, latents: LatentDataset) -> None:
        super().check(latents)
        if self.settings.first_frame_conditioning_p and taken_conditions(self.model, latents.shapes[0][0]):
            raise ConfigError(
                f"{self.name} takes its first frame as further channels: leave first_frame_conditioning_p out."
            )
        if taken_conditions(self.model, latents.shapes[0][0]):
            require_conditions(self.model, latents[0])


class WanVACE(Wan):
    """Wan's VACE: a control video, its mask and references as a context, which its pipeline makes; scales of 1."""

    needed: ClassVar[tuple[str, ...]] = (*Wan.needed, "control_hidden_states")
    known: ClassVar[tuple[str, ...]] = (*Wan.known, "control_hidden_states_scale")
    takes_first_frame: ClassVar[bool] = False

    def inputs(self, batch: Noised) -> dict[str, Any]:
        context, taken = self.require(batch, VACE_CONTEXT), self.config.vace_in_channels
        if context.shape[1] != taken:
            raise ConfigError(
                f"{self.name} takes a {VACE_CONTEXT} of {taken} channels, and the items have {context.shape[1]}: make "
                "the data with the pipeline of this model (salad-compile latents encode)."
            )
        return {**super().inputs(batch), "control_hidden_states": context}


def _features(features: Tensor) -> Tensor:
    """(B, tokens, width), or (2 B, tokens, width) of first and last frames, as the pipeline has them."""
    return features.flatten(0, 1) if features.ndim == 4 else features


def _configuration(model: nn.Module) -> Mapping[str, Any]:
    """Of the model inside DDP, where it is in that; empty where a model has none."""
    return getattr(getattr(model, "module", model), "config", None) or {}


def taken_conditions(model: nn.Module, channels: int) -> dict[str, int]:
    """What a Wan takes beside latents of so many channels, by its configuration: name -> channels, or width."""
    config = _configuration(model)
    more = (config.get("in_channels") or channels) - channels
    found = {LATENTS_IMAGE: more} if more else {}
    if config.get("image_dim"):
        found[CLIP_FEATURE] = int(config["image_dim"])
    return found


def require_conditions(model: nn.Module, item: LatentItem) -> None:
    """Whether an item has what a Wan takes.

    Raises:
        ConfigError: it has not, or it is of another size.
    """
    there, channels = conditions_of(item), item.latent.shape[0]
    for name, size in taken_conditions(model, channels).items():
        found = None if name not in there else there[name].shape[0 if name == LATENTS_IMAGE else -1]
        if found != size:
            what = "channels beside those of the latents" if name == LATENTS_IMAGE else "features of an image as wide"
            said = f"{item.name!r} has {found}" if found else f"{item.name!r} has no {name}"
            raise ConfigError(
                f"{type(model).__name__} takes {size} {what}, and {said}: make the data with the pipeline of this "
                "model (salad-compile latents encode), or with another trainer for it."
            )
    if _configuration(model).get("pos_embed_seq_len") and there[CLIP_FEATURE].ndim != 3:
        raise ConfigError(
            f"{type(model).__name__} takes features of a first and of a last frame, and {item.name!r} has those of "
            "one: make the data with the pipeline of this model (salad-compile latents encode)."
        )
