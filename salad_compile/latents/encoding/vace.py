"""What VACE is given beside noisy latents: a control video in two parts, by its mask, with references before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from salad_compile.errors import ConfigError
from salad_compile.latents.encoding.companions import Beside


def takes_vace(pipeline: Any, config: Mapping[str, Any]) -> bool:
    """Whether the pipeline makes such a context for its transformer."""
    return "vace_layers" in config and hasattr(pipeline, "prepare_video_latents")


def require_vace_channels(name: str, config: Mapping[str, Any], channels: int, spatial: int) -> None:
    """Raises ConfigError: the transformer takes another number of channels than its pipeline makes.

    Args:
        channels: of the latents. spatial: pixels of one latent in height and width.
    """
    made = 2 * channels + spatial**2
    if config.get("vace_in_channels") != made:
        raise ConfigError(
            f"the transformer of {name} takes {config.get('vace_in_channels')} channels of a control video and its "
            f"mask, and its pipeline makes {made}: they are of different models."
        )


def encode_context(pipeline: Any, video: Tensor, beside: Beside) -> tuple[Tensor, Tensor]:
    """The context, (2 C + 64, R + T, h, w), and the latents of R references, (C, R, h, w), both fp32.

    Without a control video it is an empty one, and without a mask everything is to be made anew, as the pipeline has
    it: text to video.

    Args:
        video: the clip, (1, 3, F, H, W) in [-1, 1], whose size counts.
    """
    device, size = pipeline.vae.device, video.shape[-2:]
    control = torch.zeros_like(video) if beside.control is None else _video(beside.control) / 127.5 - 1
    mask = torch.ones_like(video) if beside.mask is None else _video(beside.mask) / 255
    references = [_on_canvas(pipeline, image, (size[0], size[1])).to(device) for image in beside.references]
    with torch.no_grad():
        made = pipeline.prepare_video_latents(control.to(device), mask.to(device), [references], None, device)[0]
    made = made.float().cpu()
    context = torch.cat([made, _mask_channels(pipeline, mask[0, 0], len(references), made.shape[1])])
    return context, made[: made.shape[0] // 2, : len(references)]


def _video(pixels: Tensor) -> Tensor:
    """(F, 3, H, W) uint8 -> (1, 3, F, H, W) fp32."""
    return pixels.permute(1, 0, 2, 3)[None].float()


def _mask_channels(pipeline: Any, mask: Tensor, references: int, frames: int) -> Tensor:
    """The mask at the size of the latents, a channel for each pixel of one: (64, R + T, h, w), 0 for references.

    Args:
        mask: (F, H, W). frames: R + T.
    """
    pixels = int(pipeline.vae_scale_factor_spatial)
    count, height, width = mask.shape
    cells = mask.view(count, height // pixels, pixels, width // pixels, pixels).permute(2, 4, 0, 1, 3).flatten(0, 1)
    size = (frames - references, height // pixels, width // pixels)
    small = torch.nn.functional.interpolate(cells[None], size=size, mode="nearest-exact")[0]
    return torch.cat([torch.zeros_like(small[:, :1]).expand(-1, references, -1, -1), small], dim=1)


def _on_canvas(pipeline: Any, image: Tensor, size: tuple[int, int]) -> Tensor:
    """A reference, scaled to fit, in the middle of a white picture: (3, H, W) in [-1, 1]."""
    from PIL import Image

    given = pipeline.video_processor.preprocess(Image.fromarray(image.permute(1, 2, 0).numpy()), None, None)
    scale = min(size[0] / given.shape[-2], size[1] / given.shape[-1])
    height, width = int(given.shape[-2] * scale), int(given.shape[-1] * scale)
    scaled = torch.nn.functional.interpolate(given, size=(height, width), mode="bilinear", align_corners=False)[0]
    canvas = torch.ones(3, *size)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    canvas[:, top : top + height, left : left + width] = scaled
    return canvas
