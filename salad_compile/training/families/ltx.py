"""LTX-Video."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from salad_compile.training.families.family import Family, text_mask, token_timesteps
from salad_compile.training.flow_matching import Noised

FPS = 25.0  # of diffusers' LTXPipeline, where the data do not say
STRIDE = (8, 32, 32)  # of its VAE: frames, rows and columns of one latent


class LTXVideo(Family):
    """Flow matching; latents as tokens (B, T H W, C), positions in seconds and pixels, texts with a mask.

    For image to video a first frame takes the place of a noisy one (`first_frame_conditioning_p`).
    """

    needed: ClassVar[tuple[str, ...]] = (
        *("hidden_states", "encoder_hidden_states", "timestep", "encoder_attention_mask"),
        *("num_frames", "height", "width", "rope_interpolation_scale"),
    )

    text_width: ClassVar[str] = "caption_channels"
    takes_first_frame: ClassVar[bool] = True

    def inputs(self, batch: Noised) -> dict[str, Any]:
        self.require_channels(batch)
        frames, height, width = batch.latents.shape[2:]
        given = self.settings.first_frame_conditioning_p
        fps = float(batch.fps[0])
        return {
            "hidden_states": batch.latents.flatten(2).transpose(1, 2),
            "encoder_hidden_states": batch.texts,
            "timestep": token_timesteps(batch, (1, 1, 1)) if given else batch.timesteps,
            "encoder_attention_mask": text_mask(batch, batch.texts.dtype),
            "num_frames": frames,
            "height": height,
            "width": width,
            "rope_interpolation_scale": (STRIDE[0] / (fps if fps == fps else FPS), *STRIDE[1:]),
        }

    def unpack(self, output: Tensor, batch: Noised) -> Tensor:
        return output.transpose(1, 2).reshape(batch.latents.shape)
