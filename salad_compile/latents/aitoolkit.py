"""Reads the caches that ai-toolkit puts beside videos and images.

Seen in ostris/ai-toolkit: toolkit/dataloader_mixins/caching.py at 515d75a, toolkit/prompt_utils.py.

    _latent_cache/<name>_<hash>.safetensors   latent [C, T, H, W] or [C, H, W]
    _t_e_cache/<name>_<hash>.safetensors      text_embed or text_embed_0 [1, L, D]; attention_mask, pooled_embed

Latents are normalised as they are stored. The hash of a latent is of its size, and that of a text of its caption:
several sizes of a clip share a text, and one with texts of several captions is refused, because nothing says which.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from salad_compile.common.inside import require_inside
from salad_compile.common.tensor_files import open_safetensors
from salad_compile.latents.item import POOLED_TEXT, LatentItem
from salad_compile.latents.pickles import single
from salad_compile.latents.source import (
    Entry,
    LatentSource,
    as_latent_shape,
    entry_of,
    folders_beside,
    strip_padding,
    unique_names,
)
from salad_compile.latents.statistics import WAN_2_1

LATENTS, TEXTS = "_latent_cache", "_t_e_cache"
_FILE = re.compile(r"(?P<name>.+)_[A-Za-z0-9_-]{22}\.safetensors")  # 16 bytes in base 64
_TEXT, _MASK, _POOLED = ("text_embed", "text_embed_0"), ("attention_mask", "attention_mask_0"), "pooled_embed"


class AIToolkitSource(LatentSource):
    """All `_latent_cache/*.safetensors` of a folder."""

    layout = "aitoolkit"
    normalized = True
    guesses_statistics = True

    def __init__(self, path: Path) -> None:
        self._root = path
        self._files = _latent_files(path)
        self._texts = {name: _text_files(path, name) for name in {_name(file) for file in self._files}}
        self.statistics = WAN_2_1
        names = unique_names([_name(file) for file in self._files], [file.name for file in self._files])
        others: set[str] = set()
        self.entries = [self._entry(*pair, others) for pair in zip(names, self._files, strict=True)]
        beside = [folder for folder in folders_beside(path, (LATENTS, TEXTS)) if folder.startswith("_")]
        self.left_out = (*sorted(others), *beside)

    @classmethod
    def matches(cls, path: Path) -> bool:
        return path.is_dir() and bool(_latent_files(path))

    def load(self, index: int) -> LatentItem:
        name, file = self.entries[index].name, self._files[index]
        with open_safetensors(file) as content:
            latent = content.get_tensor("latent")
        with open_safetensors(self._texts[_name(file)][0]) as content:
            text, extras = _text(content)
        return LatentItem(name, latent if latent.ndim == 4 else latent.unsqueeze(1), text, extras=extras)

    def _entry(self, name: str, file: Path, others: set[str]) -> Entry:
        texts = self._texts[_name(file)]

        def look() -> Entry:
            for part in (file, *texts):
                require_inside(self._root, part)
            with open_safetensors(file) as content:
                shape = as_latent_shape(content.get_slice("latent").get_shape())
                others.update(set(content.keys()) - {"latent"})
            if len(texts) != 1:
                said = f"there are {len(texts)} texts of its name" if texts else "its text is missing"
                return Entry(name, shape, f"{said} in {TEXTS}")
            return Entry(name, shape)

        return entry_of(name, look)


def _latent_files(path: Path) -> list[Path]:
    return sorted(file for file in (path / LATENTS).glob("*.safetensors") if _FILE.fullmatch(file.name))


def _text_files(path: Path, name: str) -> list[Path]:
    files = (path / TEXTS).glob("*.safetensors")
    return sorted(file for file in files if _FILE.fullmatch(file.name) and _name(file) == name)


def _name(file: Path) -> str:
    match = _FILE.fullmatch(file.name)
    assert match is not None
    return match["name"]


def _text(content: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """(L, D) without padding, and the vector of the whole text. Raises ValueError."""
    keys = set(content.keys())
    text_key = next((key for key in _TEXT if key in keys), None)
    if text_key is None:
        raise ValueError(f"its text needs {' or '.join(_TEXT)}, there are {', '.join(sorted(keys)) or 'none'}")
    if "text_embed_1" in keys:
        raise ValueError("it has texts of several encoders, and nothing says which one a model takes")
    text = single(content.get_tensor(text_key), 2)
    mask = next((content.get_tensor(key) for key in _MASK if key in keys), None)
    text = strip_padding(text) if mask is None else text[single(mask, 1).bool()]
    extras = {POOLED_TEXT: single(content.get_tensor(_POOLED), 1).float()} if _POOLED in keys else {}
    return text, extras
