"""HunyuanVideo."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from salad_compile.errors import ConfigError
from salad_compile.latents.item import POOLED_TEXT
from salad_compile.training.families.family import Family, text_mask
from salad_compile.training.flow_matching import TIMESTEPS, Noised


class HunyuanVideo(Family):
    """Flow matching; a mask of the text, one vector of the whole text, and an embedded guidance."""

    needed: ClassVar[tuple[str, ...]] = (
        *("hidden_states", "timestep", "encoder_hidden_states", "encoder_attention_mask", "pooled_projections"),
    )
    known: ClassVar[tuple[str, ...]] = ("guidance",)

    def inputs(self, batch: Noised) -> dict[str, Any]:
        self.require_channels(batch)
        if getattr(self.config, "image_condition_type", None) is not None:
            raise ConfigError(f"{self.name} takes a first frame in place of noise: it needs a forward= of its own.")
        found = {
            "hidden_states": batch.latents,
            "timestep": batch.timesteps.to(batch.latents.dtype),
            "encoder_hidden_states": batch.texts,
            "encoder_attention_mask": text_mask(batch, torch.int64),
            "pooled_projections": self.require(batch, POOLED_TEXT),
        }
        if getattr(self.config, "guidance_embeds", False):
            guidance = batch.latents.new_full((len(batch.latents),), self.settings.guidance)
            found["guidance"] = guidance * TIMESTEPS
        return found
