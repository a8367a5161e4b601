"""Reads what LTX-Video-Trainer precomputes.

Seen in Lightricks/LTX-Video-Trainer: src/ltxv_trainer/datasets.py at 80b0130.

    .precomputed/latents/<name>.pt      latents [F H W, C] or [1, F H W, C], or [C, F, H, W]; num_frames, height, width
    .precomputed/conditions/<name>.pt   prompt_embeds [L, D], prompt_attention_mask [L]

Latents are normalised as they are stored.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from salad_compile.common.inside import require_inside
from salad_compile.latents.item import LatentItem
from salad_compile.latents.pickles import load_mapped, require_checksums, single
from salad_compile.latents.source import (
    Entry,
    LatentSource,
    as_latent_shape,
    entry_of,
    folders_beside,
    strip_padding,
)

FOLDER, LATENTS, CONDITIONS = ".precomputed", "latents", "conditions"
_KNOWN = ("latents", "num_frames", "height", "width", "fps")


class LTXSource(LatentSource):
    """All `latents/*.pt`, at any depth, with the file of the same name in `conditions`."""

    layout = "ltx"
    normalized = True
    guesses_statistics = True

    def __init__(self, path: Path) -> None:
        self._root = _root(path)
        self._files = sorted((self._root / LATENTS).rglob("*.pt"))
        self.statistics = None
        others: set[str] = set()
        self.entries = [self._entry(file, others) for file in self._files]
        self.left_out = (*sorted(others), *folders_beside(self._root, (LATENTS, CONDITIONS)))

    @classmethod
    def matches(cls, path: Path) -> bool:
        root = _root(path)
        return (root / CONDITIONS).is_dir() and next((root / LATENTS).rglob("*.pt"), None) is not None

    def load(self, index: int) -> LatentItem:
        file, name = self._files[index], self.entries[index].name
        for part in (file, self._text_file(file)):
            require_checksums(part, part.name)
        values, texts = load_mapped(file), load_mapped(self._text_file(file))
        text = single(texts["prompt_embeds"], 2)
        mask = texts.get("prompt_attention_mask")
        text = strip_padding(text) if mask is None else text[mask.flatten().bool()]
        fps = values.get("fps")
        return LatentItem(name, _latent(values).clone(), text.clone(), fps=float(fps) if fps else None)

    def _text_file(self, file: Path) -> Path:
        return self._root / CONDITIONS / file.relative_to(self._root / LATENTS)

    def _entry(self, file: Path, others: set[str]) -> Entry:
        name = file.relative_to(self._root / LATENTS).with_suffix("").as_posix()
        text = self._text_file(file)
        if not text.exists():
            return Entry(name, problem=f"its text is missing: no {CONDITIONS}/{text.name}")

        def look() -> Entry:
            for part in (file, text):
                require_inside(self._root, part)
            values = load_mapped(file)
            others.update(key for key in values if key not in _KNOWN)
            return Entry(name, as_latent_shape(_latent(values).shape))

        return entry_of(name, look)


def _root(path: Path) -> Path:
    return path / FOLDER if (path / FOLDER).is_dir() else path


def _latent(values: dict[str, Any]) -> Tensor:
    """(C, F, H, W), of the same or of one row for each place. Raises ValueError."""
    latent = values["latents"]
    if latent.ndim >= 4:
        return single(latent, 4)
    rows = single(latent, 2)
    frames, height, width = (int(torch.as_tensor(values[name])) for name in ("num_frames", "height", "width"))
    if len(rows) != frames * height * width:
        raise ValueError(f"the latents have {len(rows)} rows, {frames} x {height} x {width} are needed")
    return rows.view(frames, height, width, -1).permute(3, 0, 1, 2)
