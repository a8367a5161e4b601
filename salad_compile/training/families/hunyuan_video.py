"""HunyuanVideo."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from salad_compile.latents.item import POOLED_TEXT
from salad_compile.training.families.family import Family, text_mask
from salad_compile.training.flow_matching import TIMESTEPS, Noised


class HunyuanVideo(Family):
    """Flow matching; a mask of the text, one vector of the whole text, and an embedded guidance.

    Image-to-video models take the first frame in the place of a noisy one ("token_replace"), or as further channels,
    with empty frames behind it and a mask ("latent_concat").
    """

    needed: ClassVar[tuple[str, ...]] = (
        *("hidden_states", "timestep", "encoder_hidden_states", "encoder_attention_mask", "pooled_projections"),
    )
    known: ClassVar[tuple[str, ...]] = ("guidance",)
    text_width: ClassVar[str] = "text_embed_dim"

    def inputs(self, batch: Noised) -> dict[str, Any]:
        latents = batch.latents
        if self._image == "latent_concat":
            mask = torch.zeros_like(latents[:, :1])
            mask[:, :, 0] = 1  # of where a frame is given
            latents = torch.cat([latents, self.padded_first_frame(batch), mask], dim=1)
        self.require_channels(batch, latents.shape[1])
        found = {
            "hidden_states": latents,
            "timestep": batch.timesteps.to(batch.latents.dtype),
            "encoder_hidden_states": batch.texts,
            "encoder_attention_mask": text_mask(batch, torch.int64),
            "pooled_projections": self.require(batch, POOLED_TEXT),
        }
        if getattr(self.config, "guidance_embeds", False):
            guidance = batch.latents.new_full((len(batch.latents),), self.settings.guidance)
            found["guidance"] = guidance * TIMESTEPS
        return found

    @property
    def given_share(self) -> float:
        return 1.0 if self._image == "token_replace" else 0.0

    @property
    def _image(self) -> str | None:
        """How the model takes an image."""
        return getattr(self.config, "image_condition_type", None)
