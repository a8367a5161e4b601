"""Batches of equal latent shape as a pure function of the step, and collating their items."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from salad_compile.common.logs import logger
from salad_compile.errors import ConfigError, LatentItemError
from salad_compile.latents.item import LatentItem, Shape

WAN_TEXT_LENGTH = 512  # Wan's pipelines pad every text with zeros to this length


class ShapeBatches:
    """An endless sequence of batches of indices; each batch has one latent shape, on all ranks the same.

    `at(step)` depends on the arguments and the step alone: to resume, ask for the next step. In every epoch the items
    of each shape are shuffled and cut into global batches of `batch_size * world_size`, and the batches of all shapes
    are shuffled. No item comes twice in an epoch. The items of a shape that do not fill a global batch are left out of
    this epoch; the next one leaves out others. A shape with fewer items than a global batch is never used: a warning
    says so.
    """

    def __init__(
        self, shapes: Sequence[Shape], batch_size: int, *, seed: int = 0, world_size: int = 1, rank: int = 0
    ) -> None:
        """
        Args:
            shapes: of the dataset's items, as in `LatentDataset.shapes`.
            batch_size: items per rank and step.
            seed: of the order.
            world_size, rank: number of processes that take a part of every batch, and which this one is.

        Raises:
            ConfigError: a number out of range, or no shape has enough items for one global batch.
        """
        if batch_size < 1 or world_size < 1 or not 0 <= rank < world_size:
            raise ConfigError(
                f"batch_size and world_size are at least 1, and rank is below world_size: got {batch_size}, "
                f"{world_size} and {rank}."
            )
        self.batch_size, self.seed, self.world_size, self.rank = batch_size, seed, world_size, rank
        groups: dict[Shape, list[int]] = {}
        for index, shape in enumerate(shapes):
            groups.setdefault(shape, []).append(index)
        whole = batch_size * world_size
        self._groups = [groups[shape] for shape in sorted(groups) if len(groups[shape]) >= whole]
        few = {shape: len(groups[shape]) for shape in sorted(groups) if len(groups[shape]) < whole}
        if not self._groups:
            raise ConfigError(
                f"no batch can be made: {whole} items of one shape are needed (batch_size {batch_size} x world_size "
                f"{world_size}), and there are {few}. Use smaller batches, or more accumulation steps."
            )
        if few:
            logger.warning("shapes with fewer items than a batch of %d are never used: %s", whole, few)
        self.steps_per_epoch = sum(len(group) // whole for group in self._groups)
        self._last: tuple[int, list[list[int]]] | None = None  # one epoch: steps are asked for in order

    def at(self, step: int) -> list[int]:
        """This rank's indices in step `step`, counted from 0 over all epochs."""
        epoch, place = divmod(step, self.steps_per_epoch)
        return self.global_batch(epoch, place)[self.rank :: self.world_size]

    def global_batch(self, epoch: int, place: int) -> list[int]:
        """The indices of all ranks together in step `place` of an epoch."""
        if self._last is None or self._last[0] != epoch:
            self._last = epoch, self._shuffle(epoch)
        return self._last[1][place]

    def from_step(self, step: int) -> Iterator[list[int]]:
        """The batches from `step` on, without end: a `batch_sampler` for torch's DataLoader."""
        while True:
            yield self.at(step)
            step += 1

    def _shuffle(self, epoch: int) -> list[list[int]]:
        # Python's generator, seeded with a text: the same on every platform, and no use of torch's global state
        generator = random.Random(f"salad_compile.latents {self.seed} {epoch}")
        whole = self.batch_size * self.world_size
        batches = []
        for group in self._groups:
            order = generator.sample(group, len(group))
            batches += [order[start : start + whole] for start in range(0, len(order) - whole + 1, whole)]
        generator.shuffle(batches)
        return batches


@dataclass(frozen=True)
class LatentBatch:
    """Items of one latent shape as tensors.

    Attributes:
        latents: (batch, channels, frames, height, width) float32.
        text: (batch, length, width), zeros after each text; bfloat16 if all texts are, else float32.
        text_lengths: (batch,) int64.
        names, captions, fps: of each item.
    """

    latents: Tensor
    text: Tensor
    text_lengths: Tensor
    names: tuple[str, ...]
    captions: tuple[str, ...]
    fps: tuple[float | None, ...]


def collate(items: Sequence[LatentItem], *, text_length: int | None = None) -> LatentBatch:
    """Stack latents, and pad texts with zeros.

    Args:
        items: at least one, of one latent shape and one text width.
        text_length: length to pad to; None: that of the longest text. Wan's transformers have no text mask and were
            trained on 512, so use :data:`WAN_TEXT_LENGTH` for them.

    Raises:
        LatentItemError: shapes or widths differ, or a text is longer than `text_length`; the message names the item.
    """
    first = items[0]
    longest = max(len(item.text) for item in items)
    length = longest if text_length is None else text_length
    for item in items:
        if item.latent.shape != first.latent.shape or item.text.shape[1] != first.text.shape[1]:
            raise LatentItemError(
                f"{item.name} has a latent of {tuple(item.latent.shape)} and a text of width {item.text.shape[1]}, and "
                f"{first.name}, in the same batch, {tuple(first.latent.shape)} and {first.text.shape[1]}."
            )
        if len(item.text) > length:
            raise LatentItemError(f"{item.name} has a text of {len(item.text)} tokens, text_length is {length}.")
    dtype = torch.bfloat16 if all(item.text.dtype == torch.bfloat16 for item in items) else torch.float32
    text = first.text.new_zeros((len(items), length, first.text.shape[1]), dtype=dtype)
    for row, item in zip(text, items, strict=True):
        row[: len(item.text)] = item.text
    return LatentBatch(
        latents=torch.stack([item.latent for item in items]),
        text=text,
        text_lengths=torch.tensor([len(item.text) for item in items]),
        names=tuple(item.name for item in items),
        captions=tuple(item.caption for item in items),
        fps=tuple(item.fps for item in items),
    )
