"""An item of precomputed data: one latent and one text, whatever format it was read from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

Shape = tuple[int, int, int, int]  # channels, frames, height, width of a latent

# What an item may carry beside latent and text, under the names that trainers of others use. Those that are latents of
# the same VAE are normalised as the latent is.
FIRST_FRAME = "first_frame_latent"  # (C, T or 1, H, W): the first frame through the VAE, T: with empty frames behind it
CLIP_FEATURE = "clip_feature"  # (tokens, width): the first frame through the image encoder; (2, ...): and the last
LATENTS_IMAGE = "latents_image"  # (C', T, H, W): whatever a model takes beside the noisy latent, channel by channel
CONTROL = "latents_control"  # (C, T, H, W): a control video through the VAE
VACE_CONTEXT = "vace_context"  # (C', T, H, W): of VACE, a control video in two parts and its mask, with references
FRAME_INDICES = "f_indices"  # (n,): places in time of the frames of a latent
POOLED_TEXT = "pooled_text"  # (width,): one vector of the whole text
EXTRAS = (FIRST_FRAME, CLIP_FEATURE, LATENTS_IMAGE, CONTROL, VACE_CONTEXT, FRAME_INDICES, POOLED_TEXT)
LATENT_EXTRAS = (FIRST_FRAME, CONTROL)


@dataclass(frozen=True)
class LatentItem:
    """One clip.

    Attributes:
        name: used in errors and logs; unique within its dataset.
        latent: (channels, frames, height, width) float32, normalised: about mean 0 and standard deviation 1 in each
            channel over the dataset.
        text: (length, width) float32 or bfloat16, without padding.
        caption: the text that was encoded, or "" where the format does not hold it.
        fps: frames per second of the video, or None where the format does not hold it.
        extras: by name, what else a model is conditioned on; see the names above.
    """

    name: str
    latent: Tensor
    text: Tensor
    caption: str = ""
    fps: float | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)


class LatentDataset(torch.utils.data.Dataset[LatentItem]):
    """A sequence of :class:`LatentItem`, each read when it is asked for.

    Item i is the same on every call and in every process, as long as the files stay as they are.

    Attributes:
        names: name of each item.
        shapes: shape of each latent, known without reading it.
    """

    names: list[str]
    shapes: list[Shape]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> LatentItem:
        """Item `index`, from 0 to len - 1.

        Raises:
            LatentItemError: the item is damaged. IndexError: there is no such item.
        """
        raise NotImplementedError
