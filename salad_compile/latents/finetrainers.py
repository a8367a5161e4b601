"""Reads the precomputed items of finetrainers for Wan.

Seen in a-r-r-o-w/finetrainers: data/precomputation.py at 5219f52, models/wan/base_specification.py at 01d612b.

    latent-<rank>-<i>.pt      latents [1, 2C, T, H, W]: mean and log variance of the VAE's posterior, not normalised;
                              latents_mean [C] and latents_std [C], where the latter holds 1 / std
    condition-<rank>-<i>.pt   encoder_hidden_states [1, L, D], zeros at the end

finetrainers draws from the posterior in every step. We take its mean: an item must be the same on every read. Files
are opened with `weights_only=True` and mapped, so that no code in them runs and their shapes cost no reading.
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from salad_compile.common.inside import require_inside
from salad_compile.latents.item import LatentItem, Shape
from salad_compile.latents.source import Entry, LatentSource, as_latent_shape, item_error, strip_padding
from salad_compile.latents.statistics import WAN_2_1

_FILE = re.compile(r"latent-(\d+)-(\d+)\.pt")


class FinetrainersSource(LatentSource):
    """All `latent-*.pt` of a directory with their `condition-*.pt`, by rank and number."""

    layout = "finetrainers"
    normalized = False

    def __init__(self, path: Path) -> None:
        self._files = _latent_files(path)
        self.statistics = WAN_2_1
        heads = [_head(file) for file in self._files]
        if any(mean is not None and not _is_wan(mean) for _, _, mean in heads):
            self.statistics = None  # another VAE, whose statistics the user passes
        self.entries = [
            Entry(file.stem, shape, problem) for file, (shape, problem, _) in zip(self._files, heads, strict=True)
        ]

    @classmethod
    def matches(cls, path: Path) -> bool:
        return path.is_dir() and bool(_latent_files(path))

    def read(self, index: int) -> LatentItem:
        file = self._files[index]
        try:
            for part in (file, _text_file(file)):
                _require_checksums(part)
            latent = _posterior_mean(_load(file))
            text = _load(_text_file(file))["encoder_hidden_states"]
            text = text[0] if text.ndim == 3 and len(text) == 1 else text
            return LatentItem(file.stem, latent.clone(), strip_padding(text).clone())
        except Exception as error:  # whatever a damaged archive makes torch.load raise
            raise item_error(file.stem, f"{type(error).__name__}: {error}") from error


def _latent_files(path: Path) -> list[Path]:
    found = [(match, file) for file in path.glob("latent-*.pt") if (match := _FILE.fullmatch(file.name))]
    return [file for match, file in sorted(found, key=lambda pair: (int(pair[0][1]), int(pair[0][2])))]


def _text_file(latent: Path) -> Path:
    return latent.with_name(latent.name.replace("latent-", "condition-", 1))


def _load(file: Path) -> dict[str, Any]:
    values: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    return values


def _require_checksums(file: Path) -> None:
    """torch.load maps the archive and looks at none of its checksums. Raises ValueError."""
    with zipfile.ZipFile(file) as archive:
        bad = archive.testzip()
    if bad is not None:
        raise ValueError(f"{file.name}: the checksum of {bad} differs")


def _posterior_mean(values: dict[str, Any]) -> Tensor:
    latent, mean = values["latents"], values["latents_mean"]
    latent = latent[0] if latent.ndim == 5 and len(latent) == 1 else latent
    assert isinstance(latent, Tensor)
    return latent[: len(mean)] if len(latent) == 2 * len(mean) else latent


def _is_wan(mean: Tensor) -> bool:
    expected = torch.tensor(WAN_2_1.mean)
    return mean.shape == expected.shape and torch.allclose(mean.float(), expected, atol=1e-2)  # bf16 is enough


def _head(file: Path) -> tuple[Shape | None, str | None, Tensor | None]:
    """Shape, problem and the VAE's mean of an item."""
    if not _text_file(file).exists():
        return None, f"its text is missing: no {_text_file(file).name}", None
    try:
        for part in (file, _text_file(file)):
            require_inside(file.parent, part)
        values = _load(file)
        sizes = _posterior_mean(values).shape
        shape = as_latent_shape(sizes) if len(sizes) == 4 else None
        return shape, None if shape else f"latents have shape {tuple(sizes)}", values["latents_mean"].clone()
    except Exception as error:  # whatever a damaged archive makes torch.load raise
        return None, f"{file.name} cannot be read: {type(error).__name__}: {error}", None
