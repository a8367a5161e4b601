"""Which noise levels are drawn, and how much each counts in the loss: the schemes of diffusers' trainers, by name.

u is uniform, logit-normal or of "mode"; the shift makes of it the noise level s. The weights are functions of s. Both
are of arXiv 2403.03206, sections 3.1 and 5.3, and in diffusers' `weighting_scheme`.
"""

from __future__ import annotations

import math

import torch

from salad_compile.training.settings import LossWeighting, TrainSettings

SMALLEST = 1e-3  # noise level: that of the last of 1000 timesteps, of which 1 / s ** 2 is finite
_HALVINGS = 50


def shift_level(u: float, shift: float) -> float:
    """s = shift u / (1 + (shift - 1) u): more steps at high noise for longer sequences (arXiv 2403.03206, eq. 23)."""
    return shift * u / (1 + (shift - 1) * u)


def noise_range(settings: TrainSettings) -> tuple[float, float]:
    """Of u, for the noise levels that the settings allow: the shift, undone."""
    shift = settings.flow_shift
    low, high = (s / (shift - (shift - 1) * s) for s in (settings.lowest_noise, settings.highest_noise))
    return low, high


def draw_level(settings: TrainSettings, drawing: torch.Generator) -> float:
    """u, as it is distributed, within the range: an expert never sees noise of the other."""
    first, last = noise_range(settings)
    if settings.timestep_sampling == "uniform":
        return first + (last - first) * float(torch.rand((), generator=drawing))
    if settings.timestep_sampling == "mode":
        low, high = (_mode_place(u, settings.mode_scale) for u in (first, last))
        return _mode_level(low + (high - low) * float(torch.rand((), generator=drawing)), settings.mode_scale)
    if (first, last) == (0.0, 1.0):
        normal = torch.randn((), generator=drawing)
    else:
        ends = (torch.logit(torch.tensor([first, last]).double()) - settings.logit_mean) / settings.logit_std
        low, high = torch.special.ndtr(ends)
        normal = torch.special.ndtri(low + (high - low) * torch.rand((), generator=drawing).double())
    return min(max(float(torch.sigmoid(settings.logit_mean + settings.logit_std * normal)), first), last)


def _mode_level(place: float, scale: float) -> float:
    """u of "mode", 0 at place 0 and 1 at place 1, rising for all scales that the settings take."""
    return place - scale * (math.sin(math.pi * place / 2) ** 2 - place)


def _mode_place(u: float, scale: float) -> float:
    """Inverse of :func:`_mode_level`, by halving."""
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if _mode_level(middle, scale) < u else (low, middle)
    return high if u >= 1 else low


def loss_weight(s: float, weighting: LossWeighting) -> float:
    """Of a sample at noise level s: 1, 1 / s ** 2 ("sigma_sqrt") or 2 / (pi (1 - 2 s + 2 s ** 2)) ("cosmap")."""
    if weighting == "sigma_sqrt":
        return max(s, SMALLEST) ** -2
    if weighting == "cosmap":
        return 2 / (math.pi * (1 - 2 * s + 2 * s * s))
    return 1.0
