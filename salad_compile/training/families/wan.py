"""Wan 2.1 and 2.2, text to video and image to video, and models that are called like them."""

from __future__ import annotations

from typing import Any, ClassVar

from salad_compile.latents import LatentDataset
from salad_compile.training.families.family import Family
from salad_compile.training.flow_matching import Noised, require_conditions, taken_conditions, wan_inputs


class Wan(Family):
    """Flow matching; texts padded with zeros and without a mask.

    Image-to-video models take a mask and the first frame, encoded with empty frames behind it, as further channels.
    TI2V models are trained as for text to video: every token has the timestep of the sample.
    """

    needed: ClassVar[tuple[str, ...]] = ("hidden_states", "timestep", "encoder_hidden_states", "return_dict")
    known: ClassVar[tuple[str, ...]] = ("encoder_hidden_states_image",)

    def inputs(self, batch: Noised) -> dict[str, Any]:
        return wan_inputs(self.model, batch.latents, batch.timesteps, batch.texts, batch.conditions)

    def check(self, latents: LatentDataset) -> None:
        if taken_conditions(self.model, latents.shapes[0][0]):
            require_conditions(self.model, latents[0])
