"""Flow matching as Wan's trainers do it: x_s = (1 - s) x_0 + s e, the target is e - x_0, the timestep 1000 s.

Read in FastVideo, finetrainers, DiffSynth-Studio, diffusion-pipe and musubi-tuner, which agree. The error is taken in
fp32, and every noise level has the same weight.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor

from salad_compile.errors import ConfigError
from salad_compile.latents import LatentItem
from salad_compile.training.seeds import generator
from salad_compile.training.settings import TrainSettings

TIMESTEPS = 1000.0  # of diffusers' schedulers: s = 1 is timestep 1000

# takes the model, noisy latents (B, C, T, H, W), timesteps (B,) fp32, texts (B, L, D); returns the predicted velocity
Forward = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Noised:
    """Inputs and target of one forward.

    Attributes:
        latents: x_s, (B, C, T, H, W). timesteps: 1000 s, (B,), fp32. texts: (B, text_tokens, D).
        target: e - x_0, (B, C, T, H, W), fp32.
    """

    latents: Tensor
    timesteps: Tensor
    texts: Tensor
    target: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> Noised:
        """On a device; latents and texts in the dtype of the model."""
        return Noised(
            self.latents.to(device, dtype),
            self.timesteps.to(device),
            self.texts.to(device, dtype),
            self.target.to(device),
        )


def shift_level(u: float, shift: float) -> float:
    """s = shift u / (1 + (shift - 1) u): more steps at high noise for longer sequences (arXiv 2403.03206, eq. 23)."""
    return shift * u / (1 + (shift - 1) * u)


def training_sample(item: LatentItem, settings: TrainSettings, step: int, place: int) -> Noised:
    """One sample as a batch of one, in fp32 on the CPU.

    Args:
        place: of the sample in the global batch of this step.
    """
    drawing = generator(settings.seed, "step", step, place)
    if settings.timestep_sampling == "uniform":
        u = float(torch.rand((), generator=drawing))
    else:
        normal = torch.randn((), generator=drawing)
        u = float(torch.sigmoid(settings.logit_mean + settings.logit_std * normal))
    dropped = float(torch.rand((), generator=drawing)) < settings.text_dropout
    return _add_noise(item, settings, shift_level(u, settings.flow_shift), drawing, dropped)


def validation_sample(item: LatentItem, settings: TrainSettings, index: int, point: int) -> Noised:
    """As :func:`training_sample`, with the same noise every time and noise level number `point` of a fixed grid."""
    u = (point + 0.5) / settings.validation_points
    drawing = generator(settings.seed, "validation", index, point)
    return _add_noise(item, settings, shift_level(u, settings.flow_shift), drawing, False)


def _add_noise(item: LatentItem, settings: TrainSettings, s: float, drawing: torch.Generator, dropped: bool) -> Noised:
    clean = item.latent.float()
    noise = torch.randn(clean.shape, generator=drawing)
    noisy = (1 - s) * clean + s * noise
    texts = pad_text(item, settings.text_tokens)
    texts = torch.zeros_like(texts) if dropped else texts
    return Noised(noisy[None], torch.tensor([TIMESTEPS * s]), texts[None], (noise - clean)[None])


def pad_text(item: LatentItem, tokens: int) -> Tensor:
    """(tokens, D) fp32, zeros behind the text.

    Raises:
        ConfigError: the text is longer.
    """
    length, width = item.text.shape
    if length > tokens:
        raise ConfigError(f"the text of {item.name!r} has {length} tokens: set text_tokens to at least that.")
    texts = torch.zeros(tokens, width)
    texts[:length] = item.text
    return texts


def stack(samples: Sequence[Noised]) -> Noised:
    """Several samples of one shape as one batch."""
    return Noised(*(torch.cat([getattr(s, name) for s in samples]) for name in Noised.__dataclass_fields__))


def losses(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample, (B,), in fp32."""
    if prediction.shape != target.shape:
        raise ConfigError(
            f"the model predicted {tuple(prediction.shape)} for latents {tuple(target.shape)}: flow matching needs the "
            "shape of the latents. Models with more input than output channels need a forward= of their own."
        )
    return (prediction.float() - target).square().flatten(1).mean(1)


def wan_forward(model: nn.Module, latents: Tensor, timesteps: Tensor, texts: Tensor) -> Tensor:
    """The forward of diffusers' Wan and of models with its signature."""
    output: tuple[Tensor, ...] = model(
        hidden_states=latents, timestep=timesteps, encoder_hidden_states=texts, return_dict=False
    )
    return output[0]


def default_forward(model: nn.Module) -> Forward:
    """:func:`wan_forward`, if the model has its signature.

    Raises:
        ConfigError: it has another one.
    """
    needed = ("hidden_states", "timestep", "encoder_hidden_states", "return_dict")
    names = list(inspect.signature(model.forward).parameters)
    missing = [name for name in needed if name not in names]
    if missing:
        raise ConfigError(
            f"the forward of {type(model).__name__} takes {', '.join(names)}, and not {', '.join(missing)}: it is not "
            "called as Wan is. Pass train(..., forward=f), where f(model, latents, timesteps, texts) returns the "
            "predicted velocity, noise minus clean latents."
        )
    return wan_forward
