"""Reads the Parquet files of FastVideo's preprocessing.

Seen in hao-ai-lab/FastVideo: dataset/dataloader/schema.py at 07766ab, dataset/utils.py at 01f51b4. Columns:

    id, caption, fps
    vae_latent_bytes, _shape, _dtype            [C, T, H, W], or [C, H, W] of an image
    text_embedding_bytes, _shape, _dtype        [L, D] or [1, L, D], with or without zeros at the end
    text_attention_mask_bytes, _shape, _dtype   [L], in some files only
    clip_feature_, first_frame_latent_...       of image-to-video; the latter [C, T, H, W], normalised as it is stored

The trainer reads bytes as float32 whatever the dtype says; so do we, unless their number fits only that dtype. Latents
are not normalised: the trainer applies the statistics of its model's VAE, which no column names (Wan's, HunyuanVideo's
and Cosmos' have 16 channels all three). The workflow of 2026 writes a `training_dataset` and a `validation_dataset`.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from salad_compile.common.inside import require_inside
from salad_compile.errors import LatentLayoutError, MissingPackageError
from salad_compile.latents.item import CLIP_FEATURE, FIRST_FRAME, LatentItem
from salad_compile.latents.source import Entry, LatentSource, as_latent_shape, strip_padding, unique_names
from salad_compile.latents.statistics import WAN_2_1

NEEDED = (
    *("vae_latent_bytes", "vae_latent_shape", "vae_latent_dtype"),
    *("text_embedding_bytes", "text_embedding_shape", "text_embedding_dtype"),
)
# what pyarrow raises of damaged files, its own classes derive from these; and what they make of our reading
_DAMAGED = (OSError, ValueError, NotImplementedError, LookupError, TypeError, OverflowError)
# of the footer, which a damaged length would make as large as memory; pages have a checksum in files of ours
_BOUNDS: dict[str, Any] = {
    "thrift_string_size_limit": 1 << 24,
    "thrift_container_size_limit": 1 << 20,
    "page_checksum_verification": True,
}
_MASK = ("text_attention_mask_bytes", "text_attention_mask_shape", "text_attention_mask_dtype")
_EXTRAS = (FIRST_FRAME, CLIP_FEATURE)
_EXTRA_COLUMNS = tuple(f"{name}_{part}" for name in _EXTRAS for part in ("bytes", "shape", "dtype"))
TRAINING, VALIDATION = "training_dataset", "validation_dataset"
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.bfloat16, torch.float16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}


@dataclass(frozen=True)
class _Row:
    file: Path
    group: int
    row: int  # within its group


class FastVideoSource(LatentSource):
    """All `*.parquet` under a directory, in the order of their paths.

    A row is read by going through its row group from the start, or on from the last row read: in order this reads every
    byte once, at random it reads half a row group per item. FastVideo writes one row group per file, so convert big
    files before training on them.
    """

    layout = "fastvideo"
    normalized = False
    guesses_statistics = True
    extras_normalized = True

    def __init__(self, path: Path) -> None:
        """Raises LatentLayoutError: columns are missing. MissingPackageError: pyarrow is not installed."""
        require_pyarrow()
        self._rows: list[_Row | None] = []  # None: the whole file is damaged
        self._cursor: _Cursor | None = None
        names: list[str] = []
        places: list[str] = []
        found: list[tuple[list[int] | None, str | None]] = []  # shape, problem
        others: set[str] = set()
        for file in parquet_files(path):
            place = file.relative_to(path).as_posix() if path.is_dir() else file.name
            try:
                if path.is_dir():
                    require_inside(path, file)
                table = _small_columns(file)
                others |= set(table.others)
            except LatentLayoutError:
                raise
            except _DAMAGED as error:
                names.append("")
                places.append(place)
                found.append((None, f"the file cannot be read: {error}"))
                self._rows.append(None)
                continue
            for number, (row, values) in enumerate(table.rows):
                names.append(values.get("id") or "")
                places.append(f"{place}, row {number}")
                found.append((values["vae_latent_shape"], None))
                self._rows.append(row)
        self.entries = [_entry(name, *what) for name, what in zip(unique_names(names, places), found, strict=True)]
        self.statistics = WAN_2_1
        held_out = (f"{VALIDATION}/, which is a dataset of its own",) if _is_pair(path) else ()
        self.left_out = (*sorted(others), *held_out)

    @classmethod
    def matches(cls, path: Path) -> bool:
        return bool(parquet_files(path))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cursor": None}  # an open file cannot be sent to another process

    def load(self, index: int) -> LatentItem:
        name, row = self.entries[index].name, self._rows[index]
        assert row is not None
        if self._cursor is None or not self._cursor.reaches(row):
            self._cursor = _Cursor(row.file, row.group)
        try:
            values = self._cursor.row(row.row)
            latent = _tensor(values, "vae_latent")
            text = _text(values)
            extras = {name: _extra(values, name) for name in _EXTRAS if values.get(f"{name}_bytes")}
        except _DAMAGED:
            self._cursor = None
            raise
        if latent.ndim == 3:  # an image
            latent = latent.unsqueeze(1)
        fps = values.get("fps")
        return LatentItem(name, latent, text, values.get("caption") or "", fps or None, extras)


def _entry(name: str, sizes: list[int] | None, problem: str | None) -> Entry:
    shape = as_latent_shape(sizes)
    return Entry(name, shape, problem or (None if shape else f"vae_latent_shape is {sizes}"))


class _Cursor:
    """Goes through one row group, row by row, in the process that opened it."""

    def __init__(self, file: Path, group: int) -> None:
        self._place = (file, group, os.getpid())
        self._next = 0
        self._batches = self._read(file, group)

    @staticmethod
    def _read(file: Path, group: int) -> Iterator[Any]:
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(file, buffer_size=1 << 20, **_BOUNDS) as content:
            there = set(content.schema_arrow.names)
            columns = [name for name in (*NEEDED, *_MASK, *_EXTRA_COLUMNS, "caption", "fps") if name in there]
            yield from content.iter_batches(batch_size=1, row_groups=[group], columns=columns, use_threads=False)

    def reaches(self, row: _Row) -> bool:
        return self._place == (row.file, row.group, os.getpid()) and row.row >= self._next

    def row(self, number: int) -> dict[str, Any]:
        """Raises OSError or ValueError: the file is damaged."""
        batch = next(itertools.islice(self._batches, number - self._next, None), None)
        self._next = number + 1
        if batch is None:
            raise ValueError(f"{self._place[0].name} ends before row {number}")
        values: dict[str, Any] = batch.to_pylist()[0]
        return values


def require_pyarrow() -> None:
    """Raises MissingPackageError."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise MissingPackageError(
            'FastVideo\'s data are Parquet files, which need pyarrow: pip install "salad-compile[train]"'
        ) from error


def parquet_files(path: Path) -> list[Path]:
    """The file itself, or all below the directory; of a pair, those for training."""
    if path.is_file():
        return [path] if path.suffix == ".parquet" else []
    if _is_pair(path):
        path = path / TRAINING
    files = path.rglob("*.parquet")
    return sorted(file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts))


def _is_pair(path: Path) -> bool:
    return (path / TRAINING).is_dir() and (path / VALIDATION).is_dir()


@dataclass(frozen=True)
class _Table:
    """Rows of a file without their tensors, and tensors that no item has."""

    rows: list[tuple[_Row, dict[str, Any]]]
    others: list[str]


def _small_columns(file: Path) -> _Table:
    """Each row without its tensors.

    Raises:
        LatentLayoutError: columns are missing. OSError, ValueError: no Parquet file, or truncated.
    """
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file, **_BOUNDS) as content:
        there = content.schema_arrow.names
        missing = [name for name in NEEDED if name not in there]
        if missing:
            raise LatentLayoutError(
                f"{file} is a Parquet file without {', '.join(missing)}; it has {', '.join(there)}. FastVideo's data "
                "for text to video have them; text-only and trajectory data have no latents of videos."
            )
        columns = [name for name in ("id", "vae_latent_shape") if name in there]
        rows: list[tuple[_Row, dict[str, Any]]] = []
        for group in range(content.num_row_groups):
            values = content.read_row_group(group, columns=columns, use_threads=False).to_pylist()
            rows += [(_Row(file, group, row), value) for row, value in enumerate(values)]
    tensors = [name.removesuffix("_bytes") for name in there if name.endswith("_bytes")]
    known = ("vae_latent", "text_embedding", "text_attention_mask", *_EXTRAS)
    return _Table(rows, [name for name in tensors if name not in known])


def _extra(values: dict[str, Any], name: str) -> Tensor:
    """Without a batch dimension. Raises ValueError."""
    tensor = _tensor(values, name)
    usual = 4 if name == FIRST_FRAME else 2
    return tensor[0] if tensor.ndim == usual + 1 and len(tensor) == 1 else tensor


def _text(values: dict[str, Any]) -> Tensor:
    text = _tensor(values, "text_embedding")
    if text.ndim == 3 and len(text) == 1:
        text = text[0]
    if text.ndim != 2:
        raise ValueError(f"text_embedding has shape {list(text.shape)}, it needs [L, D]")
    if values.get(_MASK[0]):
        with contextlib.suppress(ValueError):  # a mask of a kind that we do not know: the zeros say it too
            text = text[: int(_tensor(values, "text_attention_mask").bool().sum())]
    return strip_padding(text)


def _tensor(values: dict[str, Any], name: str) -> Tensor:
    """A tensor from its bytes, shape and dtype.

    Raises:
        ValueError: they do not fit each other.
    """
    data, shape, dtype = values[f"{name}_bytes"], values[f"{name}_shape"], values[f"{name}_dtype"]
    if not data or not shape:
        raise ValueError(f"{name} is empty")
    named = _DTYPES.get(str(dtype).removeprefix("torch."))
    if named is None:
        raise ValueError(f"{name}_dtype is {dtype!r}, known are {', '.join(_DTYPES)}")
    number = math.prod(shape)
    for candidate in (named, torch.float32):
        if len(data) == number * candidate.itemsize:
            return torch.frombuffer(bytearray(data), dtype=candidate).view(shape)
    raise ValueError(f"{name} has {len(data)} bytes, shape {shape} of {dtype} needs {number * named.itemsize}")
