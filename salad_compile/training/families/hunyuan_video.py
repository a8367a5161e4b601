"""HunyuanVideo."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from salad_compile.latents.item import FIRST_FRAME, POOLED_TEXT
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

    def inputs(self, batch: Noised) -> dict[str, Any]:
        latents = batch.latents
        if self._image == "latent_concat":
            latents = torch.cat([latents, *self._first_frame(batch)], dim=1)
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

    def _first_frame(self, batch: Noised) -> tuple[Tensor, Tensor]:
        """The first frame with empty ones behind it, and a mask of where it is."""
        first = self.require(batch, FIRST_FRAME)
        image, mask = torch.zeros_like(batch.latents), torch.zeros_like(batch.latents[:, :1])
        image[:, :, :1], mask[:, :, 0] = first, 1
        return image, mask
