"""Clips sampled while a model trains: the base model's beside SALAD's, from the same noise, as one picture.

Frames of a clip go from left to right, dense above, SALAD below. Text and conditions are those of an item of the data:
no text encoder is needed, only the VAE.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from salad_compile.common.files import write_at_once
from salad_compile.common.progress import Tell, untold
from salad_compile.common.sharding import reshard
from salad_compile.errors import ConfigError, MissingPackageError
from salad_compile.latents import LatentDataset, LatentItem
from salad_compile.latents.conditions import reference_frames
from salad_compile.salad_files.runs import checkpoint_name
from salad_compile.sites.branch import branches
from salad_compile.training.engine import Engine
from salad_compile.training.families import Family
from salad_compile.training.flow_matching import Noised
from salad_compile.training.noise_levels import noise_range, shift_level
from salad_compile.training.preparation import DTYPES
from salad_compile.training.reference_states import as_base
from salad_compile.training.seeds import generator
from salad_compile.training.settings import TrainSettings

if TYPE_CHECKING:
    from PIL import Image

FOLDER = "samples"
COLUMNS, COLUMN_WIDTH, TITLE_HEIGHT = 6, 256, 18

# takes a normalised latent (C, T, H, W) fp32 on the device; returns frames (F, height, width, 3) uint8 on the CPU
Decode = Callable[[Tensor], Tensor]


class SampleStrips:
    """Writes `samples/step-00000100-0.png` and so on.

    Args:
        latents: of its first items text, conditions and size are taken.
        decode: of the VAE.

    Raises:
        ConfigError: the settings ask for samples, and there is no `decode`. MissingPackageError: Pillow is missing.
    """

    def __init__(
        self, engine: Engine, family: Family, latents: LatentDataset, decode: Decode | None, directory: Path
    ) -> None:
        require_decode(engine.settings, decode)
        assert decode is not None
        self.engine, self.family, self.decode = engine, family, decode
        self.folder = directory / FOLDER
        count = min(engine.settings.sample_items, len(latents))
        self.latents, self.indices = latents, range(count)
        self._dense: dict[int, Tensor] = {}  # frames: the base does not change

    def write(self, step: int, tell: Tell = untold) -> list[Path]:
        """One picture for each item; `tell` after each. Under FSDP2 every process calls it; the first one writes.

        Raises:
            WriteError: the disk is full, say.
        """
        accelerator = self.engine.accelerator
        main, found = bool(accelerator.is_main_process), []
        if main or accelerator.is_fsdp2:
            for index in self.indices:
                item = self.latents[index]
                if index not in self._dense:
                    with as_base(branches(self.engine.bare).values()):
                        self._dense[index] = self._frames(item, index)
                rows = {"dense": self._dense[index], f"SALAD, step {step}": self._frames(item, index)}
                if main:
                    found.append(self._save(rows, self.folder / f"{checkpoint_name(step)}-{index}.png"))
                tell(index + 1, len(self.indices))
        accelerator.wait_for_everyone()
        return found

    def _frames(self, item: LatentItem, index: int) -> Tensor:
        """(F, height, width, 3) uint8; nothing in processes that do not write."""
        latent = denoise(self.engine, self.family, item, index)[:, reference_frames(item) :]
        return self.decode(latent) if self.engine.accelerator.is_main_process else torch.empty(0)

    def _save(self, rows: dict[str, Tensor], path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_at_once(path) as temporary:
            strip(rows).save(temporary, format="PNG")
        return path


def require_decode(settings: TrainSettings, decode: Decode | None) -> None:
    """Raises ConfigError, MissingPackageError: the settings ask for samples, which cannot be made."""
    if not settings.sample_every:
        return
    if decode is None:
        raise ConfigError(
            "sample_every needs the VAE that latents are decoded with: name a whole pipeline as the model, or pass "
            "train(..., decode=f). sample_every=0 writes no samples."
        )
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise MissingPackageError('samples need Pillow: pip install "salad-compile[train]"') from error


@torch.no_grad()
def denoise(engine: Engine, family: Family, item: LatentItem, index: int) -> Tensor:
    """A clip of the model as it is: its normalised latent, (C, T, H, W) fp32 on the device.

    An expert, which has only a part of the noise levels, starts at its highest one, from the item itself; what it
    predicts at its lowest one is the result.
    """
    settings, model, device = engine.settings, engine.bare, engine.accelerator.device
    dtype = DTYPES[settings.precision]
    low, high = noise_range(settings)
    count = settings.sample_steps
    levels = [shift_level(high + (low - high) * n / count, settings.flow_shift) for n in range(count)] + [0.0]
    batch = family.validation_sample(item, index, 0)
    noise = torch.randn(item.latent.shape, generator=generator(settings.seed, "sample", index))
    clean = item.latent.float()
    latent = family.add_noise(clean, noise, levels[0])[0][None].to(device)
    first = clean[None, :, :1].to(device) if batch.given.any() else latent[:, :, :0]
    rest = slice(first.shape[2], None)
    model.eval()
    for s, after in itertools.pairwise(levels):
        timestep = family.add_noise(clean[:1, :1], noise[:1, :1], s)[1]
        latent = torch.cat([first, latent[:, :, rest]], dim=2)
        noisy = dataclasses.replace(batch, latents=latent.cpu(), timesteps=torch.tensor([timestep]))
        latent = family.step(latent, _guided(family, model, noisy.to(device, dtype), settings), s, after)
    reshard(model)
    model.train()
    return torch.cat([first, latent[:, :, rest]], dim=2)[0]


def _guided(family: Family, model: torch.nn.Module, batch: Noised, settings: TrainSettings) -> Tensor:
    """The prediction, with classifier-free guidance if the settings say so; the text left out as in training."""
    predicted = family.predict(model, batch).float()
    if settings.sample_guidance == 1.0:
        return predicted
    without = family.predict(model, dataclasses.replace(batch, texts=torch.zeros_like(batch.texts))).float()
    return without + settings.sample_guidance * (predicted - without)


def strip(rows: dict[str, Tensor]) -> Image.Image:
    """One picture of several clips, (F, height, width, 3) uint8 each and of one size: a row with a title for each."""
    from PIL import Image, ImageDraw

    frames, height, width, _ = next(iter(rows.values())).shape
    places = torch.linspace(0, frames - 1, min(COLUMNS, frames)).round().int().tolist()
    size = (min(width, COLUMN_WIDTH), round(height * min(width, COLUMN_WIDTH) / width))
    picture: Any = Image.new("RGB", (size[0] * len(places), (size[1] + TITLE_HEIGHT) * len(rows)), "white")
    pen = ImageDraw.Draw(picture)
    for number, (title, clip) in enumerate(rows.items()):
        top = number * (size[1] + TITLE_HEIGHT)
        pen.text((4, top + 3), title, fill="black")
        for column, place in enumerate(places):
            shown = Image.fromarray(clip[place].numpy()).resize(size)
            picture.paste(shown, (column * size[0], top + TITLE_HEIGHT))
    return picture  # type: ignore[no-any-return]
