"""Flow matching as Wan's trainers do it: x_s = (1 - s) x_0 + s e, the target is e - x_0, the timestep 1000 s.

Read in FastVideo, finetrainers, DiffSynth-Studio, diffusion-pipe and musubi-tuner, which agree. The error is taken in
fp32. Which noise levels are drawn, and how much each counts, is in noise_levels.py.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn as nn
from torch import Tensor

from salad_compile.errors import ConfigError
from salad_compile.latents import LatentItem
from salad_compile.latents.conditions import conditions_of
from salad_compile.latents.item import POOLED_TEXT
from salad_compile.training.noise_levels import draw_level, loss_weight, noise_range, shift_level
from salad_compile.training.seeds import generator
from salad_compile.training.settings import TrainSettings

TIMESTEPS = 1000.0  # of diffusers' schedulers: s = 1 is timestep 1000

# takes the model, noisy latents (B, C, T, H, W), timesteps (B,) fp32, texts (B, L, D), and if it has a fifth parameter
# conditions by name, `latents_image` (B, C', T, H, W) and `clip_feature` (B, tokens, width); returns the velocity
Forward = Callable[..., Tensor]


# takes clean latents, noise and a noise level s in [0, 1]; returns noisy latents, the timestep and the target
Noising = Callable[[Tensor, Tensor, float], tuple[Tensor, float, Tensor]]


def flow_noise(clean: Tensor, noise: Tensor, s: float) -> tuple[Tensor, float, Tensor]:
    """x_s, 1000 s and e - x_0."""
    return (1 - s) * clean + s * noise, TIMESTEPS * s, noise - clean


@dataclass(frozen=True)
class Noised:
    """Inputs and target of one forward.

    Attributes:
        latents: x_s, (B, C, T, H, W). timesteps: 1000 s, (B,), fp32. texts: (B, text_tokens, D).
        target: e - x_0, (B, C, T, H, W), fp32.
        conditions: what the extras of the items make, see :mod:`salad_compile.latents.conditions`; and `pooled_text`.
        given: whether the first frame is given, without noise and without loss, (B,) bool; empty: of none.
        weights: of each sample in the loss, (B,) fp32; empty: 1 for all.
        lengths: of each text, (B,) int64. fps: of each video, (B,), NaN where it is not known. Both on the host.
    """

    latents: Tensor
    timesteps: Tensor
    texts: Tensor
    target: Tensor
    conditions: Mapping[str, Tensor] = field(default_factory=dict)
    lengths: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    fps: Tensor = field(default_factory=lambda: torch.zeros(0))
    given: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    weights: Tensor = field(default_factory=lambda: torch.zeros(0))

    def to(self, device: torch.device, dtype: torch.dtype) -> Noised:
        """On a device; latents, texts and conditions in the dtype of the model. Pinned memory is not waited for."""

        def move(tensor: Tensor, to: torch.dtype | None = None) -> Tensor:
            return tensor.to(device, to or tensor.dtype, non_blocking=device.type != "cpu" and tensor.is_pinned())

        return Noised(
            move(self.latents, dtype),
            move(self.timesteps),
            move(self.texts, dtype),
            move(self.target),
            {name: move(t, dtype if t.is_floating_point() else None) for name, t in self.conditions.items()},
            self.lengths,
            self.fps,
            move(self.given),
            move(self.weights),
        )

    def pin(self) -> Noised:
        """In memory that a device copies from by itself, on the host."""

        def pin(tensor: Tensor) -> Tensor:
            return tensor.pin_memory() if tensor.numel() else tensor

        names = ("latents", "timesteps", "texts", "target", "given", "weights")
        conditions = {name: pin(tensor) for name, tensor in self.conditions.items()}
        return replace(self, **{name: pin(getattr(self, name)) for name in names}, conditions=conditions)


def training_sample(
    item: LatentItem, settings: TrainSettings, step: int, place: int, noising: Noising = flow_noise, share: float = 0.0
) -> Noised:
    """One sample as a batch of one, in fp32 on the CPU.

    Args:
        place: of the sample in the global batch of this step.
        share: of the samples whose first frame is given.
    """
    drawing = generator(settings.seed, "step", step, place)
    u = draw_level(settings, drawing)
    dropped = float(torch.rand((), generator=drawing)) < settings.text_dropout
    s = shift_level(u, settings.flow_shift)
    sample = _add_noise(item, settings, s, drawing, dropped, noising, share)
    return replace(sample, weights=torch.tensor([loss_weight(s, settings.loss_weighting)]))


def validation_sample(
    item: LatentItem, settings: TrainSettings, index: int, point: int, noising: Noising = flow_noise, share: float = 0.0
) -> Noised:
    """As :func:`training_sample`, with the same noise every time and noise level number `point` of a fixed grid."""
    first, last = noise_range(settings)
    u = first + (last - first) * (point + 0.5) / settings.validation_points
    drawing = generator(settings.seed, "validation", index, point)
    return _add_noise(item, settings, shift_level(u, settings.flow_shift), drawing, False, noising, share)


def _add_noise(
    item: LatentItem,
    settings: TrainSettings,
    s: float,
    drawing: torch.Generator,
    dropped: bool,
    noising: Noising,
    share: float,
) -> Noised:
    clean = item.latent.float()
    noise = torch.randn(clean.shape, generator=drawing)
    noisy, timestep, target = noising(clean, noise, s)
    given_first = share > 0 and float(torch.rand((), generator=drawing)) < share
    if given_first:
        noisy[:, 0] = clean[:, 0]  # the VAEs of these models are causal: it is that of the first frame alone
    texts = pad_text(item, settings.text_tokens)
    texts = torch.zeros_like(texts) if dropped else texts
    given = {name: item.extras[name].float() for name in (POOLED_TEXT,) if name in item.extras} | conditions_of(item)
    return Noised(
        noisy[None],
        torch.tensor([timestep]),
        texts[None],
        target[None],
        {name: tensor[None] for name, tensor in given.items()},
        torch.tensor([len(item.text)]),
        torch.tensor([float("nan") if item.fps is None else item.fps]),
        torch.tensor([given_first] if share > 0 else [], dtype=torch.bool),
    )


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
    """Several samples of one shape as one batch; with those conditions that all of them have."""
    fields = [name for name in Noised.__dataclass_fields__ if name != "conditions"]
    names = [name for name in samples[0].conditions if all(name in sample.conditions for sample in samples)]
    conditions = {name: torch.cat([sample.conditions[name] for sample in samples]) for name in names}
    return Noised(**{name: torch.cat([getattr(s, name) for s in samples]) for name in fields}, conditions=conditions)


def predict(forward: Forward, model: nn.Module, batch: Noised) -> Tensor:
    """The velocity that a model predicts for a batch, (B, C, T, H, W)."""
    inputs = (model, batch.latents, batch.timesteps, batch.texts)
    return forward(*inputs, batch.conditions) if _takes_conditions(forward) else forward(*inputs)


@functools.cache
def _takes_conditions(forward: Forward) -> bool:
    parameters = inspect.signature(forward).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(positional) > 4 or any(p.kind == p.VAR_POSITIONAL for p in parameters)


def losses(prediction: Tensor, target: Tensor, given: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
    """Mean squared error of each sample, (B,), in fp32.

    Args:
        given: of each sample, whether its first frame is left out, (B,) bool; None or empty: of none.
        weights: of each sample, (B,); None or empty: 1.
    """
    if prediction.shape != target.shape:
        raise ConfigError(
            f"the model predicted {tuple(prediction.shape)} for latents {tuple(target.shape)}: flow matching needs the "
            "shape of the latents. Other models than Wan with more input than output channels need a forward= of their "
            "own."
        )
    errors = (prediction.float() - target).square()
    whole = errors.flatten(1).mean(1)
    if given is not None and len(given):  # to look at its values would wait for a device
        whole = torch.where(given, errors[:, :, 1:].flatten(1).mean(1), whole)
    return whole if weights is None or not len(weights) else whole * weights
