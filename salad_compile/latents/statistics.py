"""Mean and standard deviation of a VAE's latents, per channel: normalising and denormalising."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from salad_compile.errors import ConfigError

_CLOSE = 1e-2  # relative: bfloat16 has 8 bits


@dataclass(frozen=True)
class LatentStatistics:
    """Statistics that normalise the latents of a VAE: (x - mean) / std, per channel.

    Raises:
        ConfigError: lengths differ, a value is not finite, or a standard deviation is not positive.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.mean or len(self.mean) != len(self.std):
            raise ConfigError(
                f"LatentStatistics needs one mean and one std per channel, got {len(self.mean)} and {len(self.std)}."
            )
        if not all(map(math.isfinite, (*self.mean, *self.std))) or min(self.std) <= 0:
            raise ConfigError("LatentStatistics needs finite means and positive standard deviations.")

    @property
    def channels(self) -> int:
        return len(self.mean)

    def normalize(self, latent: Tensor) -> Tensor:
        """(channels, ...) of any float dtype -> float32, computed in float64 and rounded once."""
        mean, std = self._columns(latent)
        return ((latent.double() - mean) / std).float()

    def denormalize(self, latent: Tensor) -> Tensor:
        """The inverse of :meth:`normalize`, up to one rounding to float32."""
        mean, std = self._columns(latent)
        return (latent.double() * std + mean).float()

    def _columns(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        column = (-1, *(1 for _ in latent.shape[1:]))
        mean = torch.tensor(self.mean, dtype=torch.float64, device=latent.device)
        std = torch.tensor(self.std, dtype=torch.float64, device=latent.device)
        return mean.view(column), std.view(column)

    def is_close(self, other: LatentStatistics) -> bool:
        """Whether both are of one VAE, as far as bfloat16 tells."""
        if self.channels != other.channels:
            return False
        pairs = zip(self.mean, self.std, other.mean, other.std, strict=True)
        return all(abs(m - n) <= _CLOSE * max(s, abs(m)) and abs(s - t) <= _CLOSE * s for m, s, n, t in pairs)

    def __str__(self) -> str:
        known = next((name for name, each in KNOWN_STATISTICS.items() if self.is_close(each)), None)
        if known is not None:
            return f"the statistics of {known}"
        shown = ", ".join(f"{mean:.3g} / {std:.3g}" for mean, std in list(zip(self.mean, self.std, strict=True))[:2])
        return f"statistics of {self.channels} channels (mean / std {shown}, ...)"

    def to_dict(self) -> dict[str, list[float]]:
        return {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LatentStatistics:
        """Raises KeyError, TypeError, ValueError or ConfigError."""
        return cls(tuple(map(float, values["mean"])), tuple(map(float, values["std"])))


# Defaults of latents_mean and latents_std of diffusers' AutoencoderKLWan (0.42.1), the VAE of Wan 2.1 and of the 14B
# models of Wan 2.2. A test compares them with the installed diffusers.
# fmt: off
WAN_2_1 = LatentStatistics(
    mean=(
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    ),
    std=(
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    ),
)
# fmt: on

# scaling_factor of the VAE of HunyuanVideo, which has 16 channels too: latents are multiplied by it
HUNYUAN_VIDEO = LatentStatistics((0.0,) * 16, (1 / 0.476986,) * 16)

KNOWN_STATISTICS = {"wan2.1": WAN_2_1, "hunyuanvideo": HUNYUAN_VIDEO}
