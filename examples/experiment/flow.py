"""Flow matching: the loss, the loss over fixed held-out triples, the Euler sampler, and similarity of clips."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from videos import COLOURS, ClipSize, draw

HELD_OUT_SEED = 2_000_003  # of no training set
BINS = 5  # of the noise level, in the held-out loss
Model = Callable[[Tensor, Tensor, Tensor], Tensor]


def flow_losses(
    model: Model,
    clips: Tensor,
    labels: Tensor,
    noise: Tensor,
    level: Tensor,
    teacher: Model | None = None,
    share: float = 0.0,
) -> Tensor:
    """fp32 (B,): mean squared error of the predicted flow noise - clips at clips + level (noise - clips).

    Args:
        clips, noise: fp32 (B, 3, T, S, S). labels: int64 (B,). level: fp32 (B,), 0 is the clip and 1 is noise.
        teacher: what it predicts is the target in place of the flow, or `share` of the target.
    """
    target = noise - clips
    noised = clips + level.view(-1, 1, 1, 1, 1) * target
    with torch.autocast(clips.device.type, dtype=torch.bfloat16, enabled=clips.device.type == "cuda"):
        if teacher is not None:
            with torch.no_grad():
                target = target.lerp(teacher(noised, level, labels).float(), share)
        predicted = model(noised, level, labels)
    return (predicted.float() - target).square().flatten(1).mean(1)


class Triples(NamedTuple):
    """Held-out clips with their noise and noise level, the same for every arm. Shapes as in :func:`flow_losses`."""

    clips: Tensor
    labels: Tensor
    noise: Tensor
    level: Tensor


def held_out_triples(count: int, size: ClipSize, device: torch.device) -> Triples:
    """`count` different clips; the levels are the middles of `count` equal steps of [0, 1].

    The noise is drawn on the CPU: the same triples on every device.
    """
    clips = draw(HELD_OUT_SEED, torch.arange(count, device=device), size)
    generator = torch.Generator().manual_seed(HELD_OUT_SEED)
    order = torch.randperm(count, generator=generator)
    noise = torch.randn(count, COLOURS, size.frames, size.edge, size.edge, generator=generator)
    return Triples(clips.video, clips.labels, noise.to(device), ((order + 0.5) / count).to(device))


@torch.no_grad()
def held_out_loss(model: Model, triples: Triples, batch: int) -> tuple[float, list[float]]:
    """The mean loss, and the means over `BINS` equal ranges of the noise level, low noise first."""
    parts = [
        flow_losses(model, *(tensor[start : start + batch] for tensor in triples))
        for start in range(0, len(triples.level), batch)
    ]
    losses = torch.cat(parts).double().cpu()
    bins = (triples.level.cpu() * BINS).long().clamp(max=BINS - 1)
    return float(losses.mean()), [float(losses[bins == number].mean()) for number in range(BINS)]


@torch.no_grad()
def sample(
    model: Model,
    noised: Tensor,
    labels: Tensor,
    steps: int,
    level: float = 1.0,
    after_step: Callable[[], object] | None = None,
) -> Tensor:
    """Clips fp32 (B, 3, T, S, S) by Euler steps of equal length.

    Args:
        noised: where to begin, fp32 (B, 3, T, S, S): noise, or clips + level (noise - clips). labels: int64 (B,).
        after_step: called after each step.
    """
    if steps < 1 or not 0 < level <= 1:
        raise ValueError(f"a sample takes 1 step or more from a level in (0, 1], got {steps} steps from {level}")
    x = noised
    for number in range(steps):
        now = torch.full((len(x),), level * (1 - number / steps), device=x.device)
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=x.device.type == "cuda"):
            flow = model(x, now, labels)
        x = x - flow.float() * (level / steps)
        if after_step is not None:
            after_step()
    return x


def psnr(clips: Tensor, reference: Tensor) -> float:
    """Mean over clips in dB; the range of pixels is 2."""
    error = (clips.clamp(-1, 1) - reference.clamp(-1, 1)).double().square().flatten(1).mean(1)
    return float((10 * torch.log10(4 / error.clamp_min(1e-12))).mean())


def ssim(clips: Tensor, reference: Tensor, window: int = 7) -> float:
    """Mean structural similarity of frames: uniform windows, pixels of [0, 2], the usual constants."""
    x, y = (1 + t.clamp(-1, 1).transpose(1, 2).flatten(0, 1) for t in (clips, reference))

    def mean(t: Tensor) -> Tensor:
        return F.avg_pool2d(t, window, stride=1)

    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2
    covariance = mean(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    alike = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float((alike / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean())
