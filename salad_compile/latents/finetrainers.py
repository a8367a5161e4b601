"""Reads the precomputed items of finetrainers: Wan, LTX-Video, HunyuanVideo and CogVideoX.

Seen in a-r-r-o-w/finetrainers: data/precomputation.py at 5219f52, models/wan/base_specification.py at 01d612b, and in
its release 0.2.0.

    latent-<i>.pt      latents [1, 2C, T, H, W]: mean and log variance of the VAE's posterior, not normalised;
                       Wan: latents_mean [C] and latents_std [C], where the latter holds 1 / std;
                       LTX-Video: num_frames, height, width, latents_mean and latents_std as they are
                       image-to-video: latent_condition [1, 2C, T, H, W], latent_condition_mask [1, 4, T, H, W],
                       encoder_hidden_states_image [1, tokens, width]
    condition-<i>.pt   encoder_hidden_states [1, L, D], or prompt_embeds

Until April 2025 the names had the rank in the middle, latent-<rank>-<i>.pt; the folder is called
finetrainers-precomputed-data unless the user says otherwise.

finetrainers draws from the posterior in every step. We take its mean: an item must be the same on every read. Files
are opened with `weights_only=True` and mapped, so that no code in them runs and their shapes cost no reading.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from salad_compile.common.inside import require_inside
from salad_compile.latents.item import CLIP_FEATURE, FIRST_FRAME, LatentItem, Shape
from salad_compile.latents.pickles import load_mapped, require_checksums, single
from salad_compile.latents.source import Entry, LatentSource, as_latent_shape, attempt, strip_padding
from salad_compile.latents.statistics import WAN_2_1, LatentStatistics

_FILE = re.compile(r"latent-(?:(\d+)-)?(\d+)\.pt")
FOLDER = "finetrainers-precomputed-data"
_TEXT = ("encoder_hidden_states", "prompt_embeds")
_FEATURE = ("encoder_hidden_states_image", "image_embeds")
_KNOWN = {
    *("latents", "latents_mean", "latents_std", "num_frames", "height", "width", *_FEATURE),
    *("latent_condition", "latent_condition_mask"),
}


class FinetrainersSource(LatentSource):
    """All `latent-*.pt` of a directory with their `condition-*.pt`, by rank and number."""

    layout = "finetrainers"
    normalized = False

    def __init__(self, path: Path) -> None:
        self._files = _latent_files(path)
        self.statistics = WAN_2_1
        heads = [_head(file) for file in self._files]
        stated = [head.statistics for head in heads if head.statistics is not None]
        self.guesses_statistics = not stated
        self.statistics = stated[0] if stated else None
        self.left_out = tuple(sorted({name for head in heads for name in head.others}))
        self.entries = [
            Entry(file.stem, head.shape, head.problem or _contradiction(head.statistics, self.statistics))
            for file, head in zip(self._files, heads, strict=True)
        ]

    @classmethod
    def matches(cls, path: Path) -> bool:
        return path.is_dir() and bool(_latent_files(path))

    def load(self, index: int) -> LatentItem:
        file = self._files[index]
        for part in (file, _text_file(file)):
            require_checksums(part, part.name)
        values, texts = load_mapped(file), load_mapped(_text_file(file))
        text = single(next(texts[name] for name in _TEXT if name in texts), 2)
        extras = {name: tensor.float().clone() for name, tensor in _extras(values).items()}
        return LatentItem(file.stem, _posterior_mean(values).clone(), strip_padding(text).clone(), extras=extras)


def _latent_files(path: Path) -> list[Path]:
    """In the folder, or in the one of the usual name inside it."""
    place = path / FOLDER if (path / FOLDER).is_dir() else path
    found = [(match, file) for file in place.glob("latent-*.pt") if (match := _FILE.fullmatch(file.name))]
    return [file for match, file in sorted(found, key=lambda pair: (int(pair[0][1] or 0), int(pair[0][2])))]


def _text_file(latent: Path) -> Path:
    return latent.with_name(latent.name.replace("latent-", "condition-", 1))


def _posterior_mean(values: dict[str, Any], name: str = "latents") -> Tensor:
    """The first half of the channels: behind them are as many log variances, of which the file's statistics know."""
    latent = single(values[name], 4)
    mean = values.get("latents_mean")
    halves = mean is None or len(latent) == 2 * mean.numel()
    if mean is not None and len(latent) not in (mean.numel(), 2 * mean.numel()):
        raise ValueError(f"{name} has {len(latent)} channels, and its statistics {mean.numel()}")
    if mean is None and len(latent) % 2:
        raise ValueError(f"{name} has {len(latent)} channels, which are not means and as many variances")
    return latent[: len(latent) // 2] if halves else latent


def _extras(values: dict[str, Any]) -> dict[str, Tensor]:
    found = {}
    if "latent_condition" in values:
        found[FIRST_FRAME] = _posterior_mean(values, "latent_condition")
    feature = next((values[name] for name in _FEATURE if name in values), None)
    if feature is not None:
        found[CLIP_FEATURE] = single(feature, 2)
    return found


def _statistics(values: dict[str, Any]) -> LatentStatistics | None:
    """What the file says: for LTX-Video, whose files have the video's size as well, std and not 1 / std."""
    if "latents_mean" not in values or "latents_std" not in values:
        return None
    mean, std = values["latents_mean"].double().flatten(), values["latents_std"].double().flatten()
    std = std if "num_frames" in values else 1 / std
    found = LatentStatistics(tuple(mean.tolist()), tuple(std.tolist()))
    return WAN_2_1 if found.is_close(WAN_2_1) else found  # the files may hold them in bfloat16


@dataclass(frozen=True)
class _Head:
    """What is known of an item before it is read. others: what its file holds and the item does not."""

    shape: Shape | None = None
    problem: str | None = None
    statistics: LatentStatistics | None = None
    others: tuple[str, ...] = ()


def _contradiction(stated: LatentStatistics | None, usual: LatentStatistics | None) -> str | None:
    if stated is None or usual is None or stated.is_close(usual):
        return None
    return f"it has {stated}, and the first item {usual}: items of two VAEs"


def _head(file: Path) -> _Head:
    if not _text_file(file).exists():
        return _Head(problem=f"its text is missing: no {_text_file(file).name}")

    def look() -> _Head:
        for part in (file, _text_file(file)):
            require_inside(file.parent, part)
        values = load_mapped(file)
        sizes = _posterior_mean(values).shape
        shape = as_latent_shape(sizes) if len(sizes) == 4 else None
        problem = None if shape else f"latents have shape {tuple(sizes)}"
        return _Head(shape, problem, _statistics(values), tuple(name for name in values if name not in _KNOWN))

    head, problem = attempt(look)
    return head or _Head(problem=problem)
