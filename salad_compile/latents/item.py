"""An item of precomputed data: one latent and one text, whatever format it was read from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, int, int, int]  # channels, frames, height, width of a latent


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
    """

    name: str
    latent: Tensor
    text: Tensor
    caption: str = ""
    fps: float | None = None


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
