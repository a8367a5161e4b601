"""What a model takes beside noisy latent and text, made of an item's extras."""

from __future__ import annotations

import torch
from torch import Tensor

from salad_compile.latents.item import (
    CLIP_FEATURE,
    CONTROL,
    FIRST_FRAME,
    FRAME_INDICES,
    LATENTS_IMAGE,
    VACE_CONTEXT,
    LatentItem,
)
from salad_compile.latents.source import item_error

MASK_CHANNELS = 4  # of Wan's image-to-video models: one for each frame that a latent stands for


def conditions_of(item: LatentItem) -> dict[str, Tensor]:
    """`latents_image`, (C', T, H, W), or `first_frame_latent`, (C, 1, H, W), and `clip_feature`, (tokens, width), all
    fp32, as far as the extras have them; `vace_context`, (C', T, H, W), likewise; and `latents_control` and
    `f_indices` as they are.

    `latents_image` is as Wan's pipelines make it: a mask that is 1 where a frame is given, the first one, and behind it
    the latents of that frame followed by empty ones.

    Raises:
        LatentItemError: it has another size than the latent.
    """
    found: dict[str, Tensor] = {}
    image, first = item.extras.get(LATENTS_IMAGE), item.extras.get(FIRST_FRAME)
    if image is None and first is not None and first.shape == item.latent.shape:
        mask = torch.zeros(MASK_CHANNELS, *first.shape[1:])
        mask[:, 0] = 1
        image = torch.cat([mask, first.float()])
    for name, tensor in ((LATENTS_IMAGE, image), (VACE_CONTEXT, item.extras.get(VACE_CONTEXT))):
        if tensor is None:
            continue
        if tensor.ndim != 4 or tensor.shape[1:] != item.latent.shape[1:]:
            raise item_error(
                item.name, f"its {name} is {tuple(tensor.shape)}, and the latent {tuple(item.latent.shape)}"
            )
        found[name] = tensor.float()
    if image is None and first is not None:
        if first.ndim != 4 or (*first.shape[:1], *first.shape[2:]) != (*item.latent.shape[:1], *item.latent.shape[2:]):
            raise item_error(
                item.name, f"its {FIRST_FRAME} is {tuple(first.shape)}, and the latent {tuple(item.latent.shape)}"
            )
        found[FIRST_FRAME] = first[:, :1].float()
    if CLIP_FEATURE in item.extras:
        found[CLIP_FEATURE] = item.extras[CLIP_FEATURE].float()
    return found | {name: item.extras[name] for name in (CONTROL, FRAME_INDICES) if name in item.extras}


def reference_frames(item: LatentItem) -> int:
    """How many frames of a latent are references of VACE, before those of the video: what it may change is empty."""
    context = item.extras.get(VACE_CONTEXT)
    if context is None:
        return 0
    channels = item.latent.shape[0]
    empty = [not frame.any() for frame in context[channels : 2 * channels].unbind(1)]
    return empty.index(False) if False in empty else 0
