"""Captions of clips: a `.txt` beside each, or a table, CSV or JSON lines, with a column of files and one of texts."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from salad_compile.common.checks import is_text
from salad_compile.common.paths import require_regular
from salad_compile.errors import ConfigError, did_you_mean

# Tables that are found by themselves: the names of datasets on the Hub, of DiffSynth-Studio and of musubi-tuner.
TABLES = tuple(f"{stem}.{suffix}" for stem in ("metadata", "captions", "dataset") for suffix in ("jsonl", "csv"))
FILE_COLUMNS = ("file_name", "file", "video", "video_path", "media_path", "path", "filename")
CAPTION_COLUMNS = ("caption", "text", "prompt")


@dataclass(frozen=True)
class Captions:
    """Texts by the path of their clip within the folder, with and without its suffix. table: where they stand."""

    texts: Mapping[str, str]
    table: Path | None = None

    def of(self, clip: Path, folder: Path) -> tuple[str, str | None]:
        """The caption of a clip and None, or "" and why there is none."""
        key = self.key_of(clip, folder)
        if key is not None:
            text = self.texts[key]
            if not is_text(text):
                return "", f"its caption in {self.table} holds half of a sign: it was cut off in the middle of one"
            return (text, None) if text else ("", f"its caption in {self.table} is empty")
        beside = clip.with_name(f"{clip.name if clip.is_dir() else clip.stem}.txt")
        try:
            require_regular(beside)  # a pipe would be waited for
            text = beside.read_text(encoding="utf-8-sig").strip()
        except FileNotFoundError:
            listed = f", and it is not listed in {self.table}" if self.table else ""
            return "", f"it has no caption: there is no {beside.name} beside it{listed}"
        except UnicodeDecodeError:
            return "", f"its caption {beside.name} is not UTF-8: save it as that"
        except OSError as error:
            return "", f"its caption {beside.name} cannot be read: {error}"
        return (text, None) if text else ("", f"its caption {beside.name} is empty")

    def key_of(self, clip: Path, folder: Path) -> str | None:
        """Under which of its names the table lists a clip, or None."""
        place = clip.relative_to(folder)
        names = (place.as_posix(), place.with_suffix("").as_posix())
        return next((name for name in names if name in self.texts), None)


def read_captions(
    folder: Path, table: Path | None = None, *, file_column: str | None = None, caption_column: str | None = None
) -> Captions:
    """The table, or one of :data:`TABLES` in the folder; without any, captions are `.txt` files alone.

    Paths of the table are relative to the folder, or absolute and below it.

    Raises:
        ConfigError: no such table or column, a row that cannot be read, or a file that is listed twice.
    """
    found = table or next((folder / name for name in TABLES if (folder / name).is_file()), None)
    if found is None:
        if file_column or caption_column:
            raise ConfigError(f"no table has the columns asked for: {folder} holds none of {', '.join(TABLES)}.")
        return Captions({})
    rows = _rows(found)
    if not rows:
        raise ConfigError(f"{found} lists nothing.")
    files = _column(found, rows, file_column, FILE_COLUMNS, "files")
    texts = _column(found, rows, caption_column, CAPTION_COLUMNS, "captions")
    listed: dict[str, str] = {}
    for number, row in enumerate(rows, start=1):
        if row and not any(row.values()):
            continue  # spreadsheets end in such rows
        file, text = row.get(files), row.get(texts)
        if not isinstance(file, str) or not file or not isinstance(text, str):
            raise ConfigError(f"{found}, row {number}: it needs a file in {files!r} and a text in {texts!r}.")
        place = _place(folder, file)
        if place in listed:
            raise ConfigError(f"{found}, row {number}: {file} is listed twice.")
        listed[place] = text.strip()
    return Captions(listed, found)


def _place(folder: Path, file: str) -> str:
    """The path within the folder, as :meth:`Captions.of` looks for it."""
    path = Path(file)
    for root in (folder.absolute(), folder.resolve()):
        if path.is_absolute() and path.is_relative_to(root):
            return path.relative_to(root).as_posix()
    return PurePosixPath(path.as_posix()).as_posix()


def _rows(table: Path) -> list[dict[str, object]]:
    """Raises ConfigError."""
    if table.suffix not in (".csv", ".jsonl"):
        raise ConfigError(f"{table} is not a table of captions, which is a .csv or .jsonl file.")
    try:
        text = table.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{table} cannot be read: it is not UTF-8, save it as that ({error}).") from error
    except OSError as error:
        raise ConfigError(f"{table} cannot be read: {error}") from error
    return _csv_rows(table, text) if table.suffix == ".csv" else _json_rows(table, text)


def _csv_rows(table: Path, text: str) -> list[dict[str, object]]:
    header = text.partition("\n")[0]
    separator = next((sign for sign in ",;\t" if sign in header), ",")  # spreadsheets of some countries write ;
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True)
        rows = [dict(row) for row in reader]
    except csv.Error as error:
        raise ConfigError(f"{table} is not a CSV file: {error}.") from error
    columns = Counter(name for name in reader.fieldnames or () if name)
    if columns and max(columns.values()) > 1:
        raise ConfigError(f"{table} has {max(columns.values())} columns {columns.most_common(1)[0][0]!r}.")
    for number, row in enumerate(rows, start=1):
        if row.pop(None, None):
            raise ConfigError(
                f"{table}, row {number}: it has more fields than the header has columns. Put a text with {separator!r} "
                'in it into quotes: "a cat, walking".'
            )
    return rows


def _json_rows(table: Path, text: str) -> list[dict[str, object]]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):  # texts may hold what else splitlines() takes for an end
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{table}, line {number}: not JSON ({error}).") from error
        if not isinstance(row, dict):
            raise ConfigError(f"{table}, line {number}: it is not a JSON object.")
        rows.append(row)
    return rows


def _column(
    table: Path, rows: Sequence[Mapping[str, object]], asked: str | None, usual: Sequence[str], what: str
) -> str:
    there = list(rows[0])
    if asked is not None:
        if asked not in there:
            hint = did_you_mean(asked, map(str, there))
            raise ConfigError(f"{table} has no column {asked!r}; it has {', '.join(map(str, there))}.{hint}")
        return asked
    found = next((column for name in usual for column in there if column.strip().lower() == name), None)
    if found is None:
        raise ConfigError(
            f"{table} has no column of {what} ({', '.join(usual)}); it has {', '.join(map(str, there))}: say which "
            f"(--{what.removesuffix('s')}-column)."
        )
    return found
