"""Reads the caches of diffusion-pipe for Wan: one folder for each size of its videos.

Seen in tdrussell/diffusion-pipe: utils/cache.py at 0b78c6b, utils/dataset.py at 0784ca8, models/wan/wan.py at 41fa128.

    latents/metadata.db, shard_<n>.bin             latents [C, T, H, W], mask; y [C, T, H, W] and clip_context of i2v
    text_embeddings_<i>/metadata.db, shard_<n>.bin text_embeddings [L, D], seq_lens

A database has the tables `items` (shard, shard_index) and `shard_<n>` (offset, size); an item is what torch.save wrote,
at its place in its shard. Texts come in the order of the latents, all captions of one after the other. Latents and y
are normalised as they are stored. Nothing says an item's shape without reading it: opening reads all latents once.
"""

from __future__ import annotations

import contextlib
import re
import sqlite3
import urllib.parse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from salad_compile.common.inside import require_inside
from salad_compile.errors import LatentLayoutError
from salad_compile.latents.item import CLIP_FEATURE, FIRST_FRAME, LatentItem
from salad_compile.latents.pickles import load_bytes, single
from salad_compile.latents.source import Entry, LatentSource, as_latent_shape, entry_of, strip_padding
from salad_compile.latents.statistics import WAN_2_1

LATENTS, DATABASE = "latents", "metadata.db"
_SHARD = re.compile(r"shard_(\d+)")
_KNOWN = ("latents", "mask", "y", "clip_context")
_LARGEST = 1 << 31  # bytes of an item


class DiffusionPipeSource(LatentSource):
    """The items of `latents/` with those of the text encoder's folder."""

    layout = "diffusionpipe"
    normalized = True
    guesses_statistics = True

    def __init__(self, path: Path) -> None:
        """Raises LatentLayoutError: a database is damaged, or texts and latents cannot be told to belong together."""
        self._latents = _Cache(path / LATENTS)
        texts = sorted(folder for folder in path.glob("text_embeddings_*") if (folder / DATABASE).is_file())
        if len(texts) != 1:
            raise LatentLayoutError(
                f"{path} has {len(texts) or 'no'} folders text_embeddings_<i> with a {DATABASE}: one is needed, of a "
                "model with one text encoder."
            )
        self._texts = _Cache(texts[0])
        if not len(self._latents) or len(self._texts) % len(self._latents):
            raise LatentLayoutError(
                f"{path} has {len(self._latents)} latents and {len(self._texts)} texts: nothing says which text is "
                "whose."
            )
        self._captions = len(self._texts) // len(self._latents)
        self.statistics = WAN_2_1
        others: set[str] = set()
        self.entries = [self._entry(index, others) for index in range(len(self._latents))]
        more = (f"{self._captions - 1} more captions of each item",) if self._captions > 1 else ()
        self.left_out = (*sorted(others), *more)

    @classmethod
    def matches(cls, path: Path) -> bool:
        return (path / LATENTS / DATABASE).is_file()

    def load(self, index: int) -> LatentItem:
        values, texts = self._latents.item(index), self._texts.item(index * self._captions)
        text = single(texts["text_embeddings"], 2)
        length = texts.get("seq_lens")
        text = strip_padding(text) if length is None else text[: int(torch.as_tensor(length))]
        extras = {}
        if isinstance(values.get("y"), Tensor) and values["y"].numel():
            extras[FIRST_FRAME] = single(values["y"], 4).float()
        if isinstance(values.get("clip_context"), Tensor) and values["clip_context"].numel():
            extras[CLIP_FEATURE] = single(values["clip_context"], 2).float()
        return LatentItem(self.entries[index].name, single(values["latents"], 4), text, extras=extras)

    def _entry(self, index: int, others: set[str]) -> Entry:
        name = f"item-{index}"

        def look() -> Entry:
            values = self._latents.item(index)
            others.update(key for key, value in values.items() if isinstance(value, Tensor) and key not in _KNOWN)
            return Entry(name, as_latent_shape(single(values["latents"], 4).shape))

        return entry_of(name, look)


class _Cache:
    """A folder of shards with its database."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            self._places = _places(folder / DATABASE)
        except (sqlite3.Error, ValueError, TypeError, LookupError) as error:
            raise LatentLayoutError(f"{folder / DATABASE} cannot be read: {error}") from error

    def __len__(self) -> int:
        return len(self._places)

    def item(self, index: int) -> dict[str, Any]:
        """What torch.save wrote. Raises ValueError, OSError, BadZipFile: it is damaged."""
        shard, offset, size = self._places[index]
        file = self._folder / f"shard_{shard}.bin"
        require_inside(self._folder, file)
        with file.open("rb") as content:
            content.seek(offset)
            data = content.read(size)
        if len(data) != size:
            raise ValueError(f"{file.name} ends before it")
        values: dict[str, Any] = load_bytes(data)
        return values


def _places(database: Path) -> list[tuple[int, int, int]]:
    """Shard, offset and size of each item. Raises sqlite3.Error, ValueError, TypeError, LookupError."""
    address = f"file:{urllib.parse.quote(str(database.resolve()))}?mode=ro&immutable=1"  # nothing is written beside it
    with contextlib.closing(sqlite3.connect(address, uri=True)) as connection:
        names = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        shards = {
            int(match[1]): [(int(o), int(s)) for o, s in connection.execute(f"SELECT offset, size FROM {name}")]
            for name in names
            if (match := _SHARD.fullmatch(str(name)))
        }
        found: list[tuple[int, int, int]] = []
        for shard, index in connection.execute("SELECT shard, shard_index FROM items"):
            offset, size = shards[int(shard)][int(index)]
            if int(index) < 0 or offset < 0 or not 0 < size <= _LARGEST:
                raise ValueError(f"item {len(found)} has offset {offset} and size {size}")
            found.append((int(shard), offset, size))
    return found
