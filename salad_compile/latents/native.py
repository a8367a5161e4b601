"""Our own format: `info.json`, `items.jsonl` and one safetensors file for each item.

    data/info.json              {"format": "salad-latents", "format_version": 1, "normalized": true, "statistics": ...}
    data/items.jsonl            one line per item: name, file, shape, text_shape, bytes, caption, fps, extras
    data/items/<name>.safetensors   "latent" (C, T, H, W) float32, normalised; "text" (L, D) float32 or bfloat16;
                                    "extra.<name>": conditions, see item.py

Every item file says in its header what its line says. `info.json` is written first and never changes; item files come
one by one; `items.jsonl` comes last and in one piece, so that a dataset is either complete or says that it is not.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from salad_compile.common.files import name_failures
from salad_compile.common.inside import inside
from salad_compile.common.paths import as_directory
from salad_compile.common.schema import (
    InfoFields,
    ItemFields,
    RecordFields,
    VersionFields,
    decode,
    decode_file,
    fields_of,
    stamp,
)
from salad_compile.common.tensor_files import first_not_finite, open_safetensors, require_digest
from salad_compile.errors import ConfigError, LatentItemError, LatentLayoutError
from salad_compile.latents.item import LatentItem
from salad_compile.latents.source import Entry, LatentSource, as_latent_shape, check_item, item_error, require_kinds
from salad_compile.latents.statistics import LatentStatistics
from salad_compile.latents.storing import file_stem, save_tensors, save_text, writing_in

FORMAT = "salad-latents"
FORMAT_VERSION = 1
INFO = "info.json"
INDEX = "items.jsonl"
FOLDER = "items"
_RECORD = "salad_latent"  # key of an item's line in the metadata of its file
_ORIGIN = "salad_origin"  # key of what an item was made from, by which a later run knows whether it still is
_EXTRA = "extra."


def write_latents(
    items: Iterable[LatentItem],
    directory: str | os.PathLike[str],
    *,
    statistics: LatentStatistics | None = None,
) -> Path:
    """Write items, or append them to an existing dataset.

    Args:
        items: with normalised latents; of a generator, one item at a time is held in memory.
        directory: made if need be.
        statistics: how the latents were normalised, kept for the way back to formats that store them otherwise.

    Returns:
        The directory.

    Raises:
        LatentItemError: an item is not fit to be written, or its name is taken. What was written before stays; nothing
            of it is listed before all is there.
        LatentLayoutError: the directory holds a dataset with other statistics, or of another version.
        WriteError: the disk is full, say, or the directory cannot be written to, or another process writes there.
    """
    goal = as_directory(directory)
    with writing_in(goal):
        writer = NativeWriter(goal, statistics)
        for item in items:
            require_kinds(item)
            if item.name in writer.names:
                raise item_error(item.name, f"an item of this name is in {writer.directory} already")
            writer.write(item)
        writer.finish()
    return writer.directory


class NativeWriter:
    """Writes item by item; :meth:`finish` makes a dataset of them."""

    def __init__(
        self, directory: Path, statistics: LatentStatistics | None = None, *, encoded: dict[str, Any] | None = None
    ) -> None:
        """encoded: how the items were made, for `info.json`; the index then lists what this writer writes or keeps.

        Raises LatentLayoutError: the directory holds a dataset that these items cannot join.
        """
        self.directory = directory
        with name_failures(directory):
            (directory / FOLDER).mkdir(parents=True, exist_ok=True)
        if (directory / INFO).exists():
            known = read_info(directory)
            if known != statistics:
                raise LatentLayoutError(
                    f"{directory} holds latents that were normalised with other statistics than these. "
                    "Write to another directory."
                )
        else:
            save_text(directory / INFO, json.dumps(_info(statistics, encoded), indent=1))
        appends = encoded is None and (directory / INDEX).exists()
        self._records = {record["name"]: record for record in read_index(directory)} if appends else {}

    @property
    def names(self) -> set[str]:
        """Items of the dataset so far."""
        return set(self._records)

    def keep(self, name: str, origin: str | None = None) -> bool:
        """Take the file that an interrupted run wrote for this item; whether there is one, of this origin."""
        file = self._file(name)
        if not file.exists():
            return False
        try:
            with open_safetensors(file) as content:
                if origin is not None and (content.metadata() or {}).get(_ORIGIN) != origin:
                    return False
                self._records[name] = _with_place(_stated(content, file), file)
        except ValueError as error:
            raise item_error(name, f"{error}. Delete {file} and run again") from error
        return True

    def write(self, item: LatentItem, origin: str | None = None) -> None:
        """Write one item's file.

        Raises:
            LatentItemError: the latent is not (C, T, H, W), the text not (L, D), or a value is not finite.
        """
        require_kinds(item)
        shape = as_latent_shape(item.latent.shape) if item.latent.ndim == 4 else None
        if shape is None:
            raise item_error(item.name, f"the latent has shape {tuple(item.latent.shape)}, it needs (C, T, H, W)")
        item = check_item(item, shape)
        record = {
            "name": item.name,
            "shape": list(shape),
            "text_shape": list(item.text.shape),
            "caption": item.caption,
            "fps": item.fps,
            **({"extras": {name: list(t.shape) for name, t in sorted(item.extras.items())}} if item.extras else {}),
        }
        tensors = {"latent": item.latent.detach().cpu(), "text": item.text.detach().cpu()}
        tensors |= {_EXTRA + name: tensor.detach().cpu() for name, tensor in item.extras.items()}
        file = self._file(item.name)
        made_from = {} if origin is None else {_ORIGIN: origin}
        save_tensors(file, tensors, {"format": "pt", _RECORD: json.dumps(record), **made_from})
        self._records[item.name] = _with_place(record, file)

    def finish(self) -> None:
        """List the items, in the order in which they were written or kept."""
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in self._records.values()]
        save_text(self.directory / INDEX, "".join(lines))

    def _file(self, name: str) -> Path:
        return self.file_of(self.directory, name)

    @staticmethod
    def file_of(directory: Path, name: str) -> Path:
        """The file of an item in a dataset."""
        return directory / FOLDER / f"{file_stem(name)}.safetensors"


class NativeSource(LatentSource):
    """Reads what :func:`write_latents` writes."""

    layout = "salad"
    normalized = True

    def __init__(self, path: Path) -> None:
        """Raises LatentLayoutError: unfinished, another version, or not readable."""
        self.statistics = read_info(path)
        if not (path / INDEX).exists():
            raise LatentLayoutError(
                f"{path} was never finished: {INDEX} is missing. Run what wrote it again; it resumes where it stopped."
            )
        self._path = path
        self._records = read_index(path)
        self.entries = [self._entry(record) for record in self._records]

    @classmethod
    def matches(cls, path: Path) -> bool:
        return (path / INFO).exists() and ((path / INDEX).exists() or (path / FOLDER).is_dir())

    def load(self, index: int) -> LatentItem:
        record = self._records[index]
        with open_safetensors(inside(self._path, record["file"])) as content:
            tensors = {key: content.get_tensor(key) for key in _keys(record)}
            stated = _stated(content, Path(record["file"]))
            if any(record.get(key) != value for key, value in stated.items()):
                raise ValueError(f"its file is of {stated}, and {INDEX} says otherwise")
            bad = first_not_finite(tensors)
            if bad is not None:
                raise ValueError(f"the {bad} holds NaN or infinity")
            require_digest(content.metadata(), tensors)
        latent = tensors["latent"]
        if latent.dtype != torch.float32:
            raise ValueError(f"the latent is {latent.dtype}, this format has float32")
        extras = {key.removeprefix(_EXTRA): value for key, value in tensors.items() if key.startswith(_EXTRA)}
        return LatentItem(record["name"], latent, tensors["text"], record["caption"], record["fps"], extras)

    def _entry(self, record: dict[str, Any]) -> Entry:
        name, shape = record["name"], as_latent_shape(record["shape"])
        try:
            file = inside(self._path, record["file"])
            size = file.stat().st_size if file.exists() else None
        except (ValueError, OSError) as error:  # it leads elsewhere, or is no name that the system takes
            return Entry(name, shape, str(error)[:300])
        if size is None:
            return Entry(name, shape, f"{record['file']} is missing")
        if size != record["bytes"]:
            return Entry(name, shape, f"{record['file']} has {size} bytes, the index says {record['bytes']}")
        problem = None if shape else f"the index says shape {record['shape']}"
        return Entry(name, shape, problem, record["text_shape"][0])


def read_info(directory: Path) -> LatentStatistics | None:
    """The statistics in `info.json`.

    Raises:
        LatentLayoutError: missing, another version, or not readable.
    """
    file = directory / INFO
    try:
        known = decode_file(VersionFields, file, LatentLayoutError)
        if known.format_version != FORMAT_VERSION:
            raise LatentLayoutError(
                f"{file} says version {known.format_version}; this release reads {FORMAT!r}, version {FORMAT_VERSION}."
            )
        values = fields_of(decode_file(InfoFields, file, LatentLayoutError))
        if values["format"] != FORMAT:
            raise LatentLayoutError(f"{file} says {values['format']!r}; this release reads {FORMAT!r}.")
        return None if values["statistics"] is None else LatentStatistics.from_dict(values["statistics"])
    except (OSError, ConfigError) as error:
        raise LatentLayoutError(f"{file} is not readable: {error}") from error


def read_index(directory: Path) -> list[dict[str, Any]]:
    """The lines of `items.jsonl`.

    Raises:
        LatentLayoutError: a line is not readable. LatentItemError: an item is listed twice.
    """
    file = directory / INDEX
    records: list[dict[str, Any]] = []
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            record = decode(RecordFields, line, f"{file}, line {number},", LatentLayoutError)
            records.append(fields_of(record))
    if len({record["name"] for record in records}) != len(records):
        raise LatentItemError(f"{file} lists an item twice.")
    return records


def _stated(content: Any, file: Path) -> dict[str, Any]:
    """What the file of an item says of itself. Raises ValueError."""
    text = (content.metadata() or {}).get(_RECORD)
    if text is None:
        raise ValueError(f"{file.name} has no {_RECORD}")
    return fields_of(decode(ItemFields, text, file.name, LatentItemError))


def _keys(record: dict[str, Any]) -> list[str]:
    return ["latent", "text", *(_EXTRA + name for name in record.get("extras", {}))]


def _info(statistics: LatentStatistics | None, encoded: dict[str, Any] | None) -> dict[str, Any]:
    return stamp(
        {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "normalized": True,
            "statistics": None if statistics is None else statistics.to_dict(),
            **({} if encoded is None else {"encoded": encoded}),
        }
    )


def _with_place(record: dict[str, Any], file: Path) -> dict[str, Any]:
    return {**record, "file": f"{FOLDER}/{file.name}", "bytes": file.stat().st_size}
