"""Reads what DiffSynth-Studio caches for Wan (`--task sft:data_process`).

Seen in modelscope/DiffSynth-Studio, release 2.1.12: diffusion/runner.py, pipelines/wan_video.py.

    <out>/<rank>/<n>.pth   three dictionaries: inputs of both guidances, of the text, of the negative text;
                           input_latents [1, C, T, H, W], context [1, L, D] with zeros at its end;
                           image-to-video: y [1, 4 + C, T, H, W], clip_feature [1, tokens, width]

Latents are normalised as they are stored. DiffSynth-Studio loads these files with code; we do not: a file with more
in it than tensors and plain values is damaged for us.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from salad_compile.common.inside import require_inside
from salad_compile.latents.item import CLIP_FEATURE, LATENTS_IMAGE, VACE_CONTEXT, LatentItem
from salad_compile.latents.pickles import load_mapped, require_checksums, single
from salad_compile.latents.source import Entry, LatentSource, as_latent_shape, entry_of, strip_padding
from salad_compile.latents.statistics import WAN_2_1

_LATENT, _TEXT = "input_latents", "context"
# name there -> name here, dimensions; references of VACE come first in its context and in the latents, as here
_EXTRAS = {"y": (LATENTS_IMAGE, 4), CLIP_FEATURE: (CLIP_FEATURE, 2), VACE_CONTEXT: (VACE_CONTEXT, 4)}
_NOT_DATA = ("latents", "noise")  # what training draws anew


class DiffSynthSource(LatentSource):
    """All `<rank>/<n>.pth`, by rank and number."""

    layout = "diffsynth"
    normalized = True
    guesses_statistics = True

    def __init__(self, path: Path) -> None:
        self._root, self._files = path, _files(path)
        self.statistics = WAN_2_1
        others: set[str] = set()
        self.entries = [self._entry(file, others) for file in self._files]
        self.left_out = tuple(sorted(others))

    @classmethod
    def matches(cls, path: Path) -> bool:
        return path.is_dir() and bool(_files(path))

    def load(self, index: int) -> LatentItem:
        file, name = self._files[index], self.entries[index].name
        require_checksums(file, file.name)
        both = _dictionaries(file)
        extras = {
            ours: single(both[theirs], usual).float().clone()
            for theirs, (ours, usual) in _EXTRAS.items()
            if isinstance(both.get(theirs), Tensor)
        }
        text = strip_padding(single(both[_TEXT], 2)).clone()
        return LatentItem(name, single(both[_LATENT], 4).clone(), text, _caption(both), extras=extras)

    def _entry(self, file: Path, others: set[str]) -> Entry:
        name = f"{file.parent.name}-{file.stem}"

        def look() -> Entry:
            require_inside(self._root, file)
            both, known = _dictionaries(file), (_LATENT, _TEXT, *_EXTRAS, *_NOT_DATA)
            others.update(key for key, value in both.items() if isinstance(value, Tensor) and key not in known)
            return Entry(name, as_latent_shape(single(both[_LATENT], 4).shape))

        return entry_of(name, look)


def _files(path: Path) -> list[Path]:
    found = [file for file in path.glob("*/*.pth") if file.parent.name.isdigit() and file.stem.isdigit()]
    return sorted(found, key=lambda file: (int(file.parent.name), int(file.stem)))


def _dictionaries(file: Path) -> dict[str, Any]:
    """Those of both guidances and of the text in one. Raises ValueError: something else."""
    values = load_mapped(file)
    if not isinstance(values, (tuple, list)) or len(values) != 3 or not all(isinstance(v, dict) for v in values):
        raise ValueError("it does not hold three dictionaries")
    return {**values[0], **values[1]}


def _caption(values: dict[str, Any]) -> str:
    prompt = values.get("prompt")
    return prompt if isinstance(prompt, str) else ""
