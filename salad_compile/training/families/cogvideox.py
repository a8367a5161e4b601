"""CogVideoX, text to video and image to video."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn as nn
from torch import Tensor

from salad_compile.errors import ConfigError
from salad_compile.latents import LatentDataset
from salad_compile.training.families.family import Family
from salad_compile.training.flow_matching import Noised
from salad_compile.training.settings import TrainSettings

OFS = 2.0  # that the pipeline of 1.5 gives its image-to-video model


class CogVideoX(Family):
    """Diffusion with prediction of v = sqrt(a) e - sqrt(1 - a) x_0; frames before channels; texts of one length.

    Image-to-video models take the first frame as further channels, with empty frames behind it.
    """

    needed: ClassVar[tuple[str, ...]] = ("hidden_states", "encoder_hidden_states", "timestep", "image_rotary_emb")

    text_width: ClassVar[str] = "text_embed_dim"

    def __init__(self, model: nn.Module, settings: TrainSettings) -> None:
        super().__init__(model, settings)
        import diffusers

        make: Any = diffusers.CogVideoXDDIMScheduler
        scheduler = make(rescale_betas_zero_snr=True, snr_shift_scale=settings.snr_shift_scale)
        self.kept: Tensor = scheduler.alphas_cumprod.double()

    @property
    def most_text(self) -> tuple[int, str]:
        usual, helps = super().most_text
        most = int(self.config.max_text_seq_length)
        return (most, f"{self.name} takes no more, encode a shorter caption") if most < usual else (usual, helps)

    def check(self, latents: LatentDataset) -> None:
        super().check(latents)
        if self.settings.loss_weighting != "none":
            raise ConfigError(
                f"loss_weighting weighs noise levels of flow matching, and {self.name} predicts v: leave it out."
            )

    def add_noise(self, clean: Tensor, noise: Tensor, s: float) -> tuple[Tensor, float, Tensor]:
        timestep = self._timestep(s)
        signal, level = self._shares(timestep)
        return signal * clean + level * noise, float(timestep), signal * noise - level * clean

    def step(self, noisy: Tensor, prediction: Tensor, s: float, after: float) -> Tensor:
        """As DDIM does it."""
        signal, level = self._shares(self._timestep(s))
        clean, noise = signal * noisy - level * prediction, signal * prediction + level * noisy
        if after == 0.0:
            return clean
        signal, level = self._shares(self._timestep(after))
        return signal * clean + level * noise

    def _timestep(self, s: float) -> int:
        return min(int(s * len(self.kept)), len(self.kept) - 1)

    def _shares(self, timestep: int) -> tuple[float, float]:
        """Of the clean latents and of the noise in noisy ones."""
        kept = float(self.kept[timestep])
        return kept**0.5, (1 - kept) ** 0.5

    def inputs(self, batch: Noised) -> dict[str, Any]:
        latents = batch.latents
        if self.config.in_channels == 2 * latents.shape[1]:
            latents = torch.cat([latents, self.padded_first_frame(batch)], dim=1)
        self.require_channels(batch, latents.shape[1])
        tokens = self.config.max_text_seq_length
        if int(batch.lengths.max()) > tokens:
            raise ConfigError(f"{self.name} takes texts of {tokens} tokens, and one has {int(batch.lengths.max())}.")
        missing = max(tokens - batch.texts.shape[1], 0)
        texts = nn.functional.pad(batch.texts, (0, 0, 0, missing))[:, :tokens]
        more = {"ofs": latents.new_full((1,), OFS)} if getattr(self.config, "ofs_embed_dim", None) else {}
        return {
            "hidden_states": latents.transpose(1, 2),
            "encoder_hidden_states": texts,
            "timestep": batch.timesteps,
            "image_rotary_emb": self._rotation(batch),
            **more,
        }

    def unpack(self, output: Tensor, batch: Noised) -> Tensor:
        return output.transpose(1, 2)

    def _rotation(self, batch: Noised) -> tuple[Tensor, Tensor] | None:
        """As the pipeline makes it: from the size of the latents, and the one that the model was trained at."""
        if not self.config.use_rotary_positional_embeddings:
            return None
        from diffusers.models.embeddings import get_3d_rotary_pos_embed
        from diffusers.pipelines.cogvideo import pipeline_cogvideox

        patch, patch_t = self.config.patch_size, self.config.patch_size_t
        frames, *size = batch.latents.shape[2:]
        grid = (size[0] // patch, size[1] // patch)
        base = (self.config.sample_height // patch, self.config.sample_width // patch)
        common = {"embed_dim": self.config.attention_head_dim, "grid_size": grid, "device": batch.latents.device}
        if patch_t is None:
            crop: Any = pipeline_cogvideox.get_resize_crop_region_for_grid
            crops = crop(grid, base[1], base[0])
            cos, sin = get_3d_rotary_pos_embed(crops_coords=crops, temporal_size=frames, **common)
        else:
            cos, sin = get_3d_rotary_pos_embed(
                crops_coords=None,
                temporal_size=-(-frames // patch_t),
                grid_type="slice",
                max_size=base,
                **common,
            )
        assert isinstance(cos, torch.Tensor)
        assert isinstance(sin, torch.Tensor)
        return cos, sin
