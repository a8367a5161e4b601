"""What a VAE of diffusers says of its latents: channels, compression, statistics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from salad_compile.errors import ConfigError
from salad_compile.latents.statistics import LatentStatistics

_CHANNELS = ("z_dim", "latent_channels")
_TEMPORAL = ("temporal_compression_ratio", "scale_factor_temporal")
_SPATIAL = ("spatial_compression_ratio", "scale_factor_spatial")


def latent_channels(vae: Any) -> int:
    """Channels of a VAE's latents. Raises ConfigError: its configuration does not say them."""
    return int(_stated(vae, _CHANNELS, "channels of its latents"))


def statistics_of_config(config: Mapping[str, Any]) -> LatentStatistics | None:
    """The statistics in a VAE's configuration, None where it has none: (x - mean) scale / std, or (x - shift) scale.

    Raises:
        ConfigError: they are not of its number of channels, or no numbers.
    """
    try:
        return _statistics(config)
    except ConfigError:
        raise
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"the statistics in the configuration of the VAE are no numbers: {error}.") from error


def _statistics(config: Mapping[str, Any]) -> LatentStatistics | None:
    channels = next((config[name] for name in _CHANNELS if config.get(name)), None)
    mean, std = config.get("latents_mean"), config.get("latents_std")
    scale = config.get("scaling_factor")
    if mean is not None and std is not None:
        if channels is not None and not len(mean) == len(std) == channels:
            raise ConfigError(
                f"the VAE has {channels} channels, and its statistics {len(mean)} and {len(std)}: they are of another."
            )
        return LatentStatistics(tuple(map(float, mean)), tuple(float(value) / (scale or 1.0) for value in std))
    if scale is None or channels is None:
        return None
    shift = float(config.get("shift_factor") or 0.0)
    return LatentStatistics((shift,) * channels, (1 / float(scale),) * channels)


def vae_statistics(vae: Any) -> LatentStatistics:
    """The statistics that normalise the latents of a VAE, from its buffers or its configuration.

    Raises:
        ConfigError: it has none, or they do not fit its channels.
    """
    buffers = dict(vae.named_buffers(recurse=False))
    mean, std = buffers.get("latents_mean"), buffers.get("latents_std")
    config = dict(vae.config)
    if mean is not None and std is not None:
        config |= {"latents_mean": mean.float().tolist(), "latents_std": std.float().tolist()}
    found = statistics_of_config(config)
    if found is None:
        raise ConfigError(
            f"{type(vae).__name__} says neither latents_mean and latents_std nor a scaling_factor: how its latents are "
            "normalised is not known."
        )
    return found


def compression(pipeline: Any) -> tuple[int, int]:
    """Frames of one latent after the first, and pixels of one latent in height and width, as the pipeline has them."""
    temporal = getattr(pipeline, "vae_scale_factor_temporal", None) or getattr(
        pipeline, "vae_temporal_compression_ratio", None
    )
    spatial = getattr(pipeline, "vae_scale_factor_spatial", None) or getattr(
        pipeline, "vae_spatial_compression_ratio", None
    )
    return (
        int(temporal or _stated(pipeline.vae, _TEMPORAL, "compression in time")),
        int(spatial or _stated(pipeline.vae, _SPATIAL, "compression in space")),
    )


def encode_video(vae: Any, video: Tensor) -> Tensor:
    """(1, 3, F, H, W) in [-1, 1] -> (C, T, h, w) on the CPU: the mode of the posterior, not normalised."""
    with torch.no_grad():
        output = vae.encode(video.to(vae.device, vae.dtype))
    posterior = getattr(output, "latent_dist", None)
    latent: Tensor = output.latents if posterior is None else posterior.mode()
    return latent[0].cpu()


def decode_latent(vae: Any, statistics: LatentStatistics, latent: Tensor) -> Tensor:
    """(C, T, h, w), normalised, on the VAE's device -> frames (F, H, W, 3) uint8 on the CPU."""
    more = (torch.zeros(1, device=latent.device),) if vae.config.get("timestep_conditioning") else ()  # LTX-Video's
    with torch.no_grad():
        video = vae.decode(statistics.denormalize(latent)[None].to(vae.dtype), *more, return_dict=False)[0]
    frames: Tensor = (video[0].permute(1, 2, 3, 0).float() + 1) * 127.5
    return frames.round().clamp(0, 255).to(torch.uint8).cpu()


def _stated(module: Any, names: tuple[str, ...], what: str) -> int:
    for name in names:
        value = module.config.get(name) or vars(module).get(name)  # diffusers warns of configuration as attributes
        if value:
            return int(value)
    raise ConfigError(f"{type(module).__name__} does not say the {what}: no {' or '.join(names)} in its configuration.")
