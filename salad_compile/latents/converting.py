"""convert_latents: from any format that is read into our own, musubi-tuner's or FastVideo's."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from salad_compile.common.files import read_json
from salad_compile.common.logs import logger
from salad_compile.common.paths import as_path
from salad_compile.common.progress import ProgressBar
from salad_compile.errors import ConfigError, LatentItemError, did_you_mean
from salad_compile.latents.dataset import OnError, StoredLatents, summary_of
from salad_compile.latents.fastvideo_writing import FastVideoWriter
from salad_compile.latents.item import LatentItem
from salad_compile.latents.layouts import WRITABLE, Readable, Writable
from salad_compile.latents.musubi import MusubiWriter
from salad_compile.latents.native import NativeWriter
from salad_compile.latents.opening import open_latents
from salad_compile.latents.source import Problem
from salad_compile.latents.statistics import LatentStatistics
from salad_compile.latents.storing import save_text, writing_in

PLAN = "salad_conversion.json"
_FILES = "files_sha256"  # in it; conversions of earlier releases have none
_ROWS_PER_FILE = 16  # of a Parquet file, which is held in memory: a Wan clip of 480p and 81 frames takes up to 16 MB


@dataclass(frozen=True)
class ConversionReport:
    """What convert_latents did.

    Attributes:
        path: the new dataset.
        written: items written now.
        kept: items that an earlier, interrupted run had written.
        skipped: damaged items of the source that were left out.
    """

    path: Path
    written: int
    kept: int
    skipped: tuple[Problem, ...]


@dataclass(frozen=True)
class _Target:
    """The writer of a format: `per_file` items at a time, numbered from 0."""

    per_file: int
    keep: Callable[[int, Sequence[int]], bool]
    write: Callable[[int, list[LatentItem]], None]
    finish: Callable[[], None]


def convert_latents(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    layout: Readable | Literal["auto"] = "auto",
    to: Writable = "salad",
    normalized: bool | None = None,
    statistics: LatentStatistics | None = None,
    on_error: OnError = "raise",
    progress: bool = True,
) -> ConversionReport:
    """Write a dataset in another format. Run again after an interruption, it resumes where it stopped.

    Values are float32 on the way. Between "salad" and "musubi" they come through bit by bit; "fastvideo" is not
    normalised, which costs one rounding to float32 each way. Every file appears as a whole or not at all.

    Args:
        source, layout, normalized, statistics, on_error: as of :func:`open_latents`. Damaged items that are skipped are
            left out, and named in the report.
        destination: a directory: new, empty, or left by an interrupted run of the same conversion.
        to: "salad", "musubi" or "fastvideo".
        progress: show a bar if the output is a terminal.

    Raises:
        ConfigError: an unknown option, a destination that holds something else, or no statistics for "fastvideo".
        LatentItemError: an item is damaged (with on_error="raise"), or none is good.
        WriteError: for example, the disk is full. Items that were written stay, for the next run.
        Others as of :func:`open_latents`.
    """
    if to not in WRITABLE:
        raise ConfigError(f"to is one of {', '.join(WRITABLE)}; got {to!r}.{did_you_mean(to, WRITABLE)}")
    origin, goal = as_path(source), as_path(destination)
    latents = open_latents(origin, layout=layout, normalized=normalized, statistics=statistics, on_error=on_error)
    if to == "fastvideo" and latents.statistics is None:
        raise ConfigError("FastVideo's latents are not normalised: pass statistics= of their VAE to undo it.")
    _require_apart(goal, origin)
    with writing_in(goal):
        _claim(goal, {**_plan(latents, to), _FILES: _digest_of_files(origin)})
        return _write_all(latents, origin, goal, to, on_error, progress)


def _write_all(
    latents: StoredLatents, origin: Path, goal: Path, to: str, on_error: str, progress: bool
) -> ConversionReport:
    target = _target(to, goal, latents)
    written, kept, skipped = 0, 0, list(latents.problems)
    lost: set[str] = set()
    with ProgressBar(goal.name, len(latents), shown=progress) as bar:
        for number, start in enumerate(range(0, len(latents), target.per_file)):
            indices = range(start, min(start + target.per_file, len(latents)))
            if target.keep(number, indices):
                kept += len(indices)
            else:
                items = _read(latents, indices, skipped, on_error)
                if items:
                    target.write(number, items)
                lost |= {name for item in items for name in item.extras if to != "salad"}
                written += len(items)
            bar.advance(len(indices))
    if not written + kept:
        raise LatentItemError(f"{origin} has no good item. {summary_of(skipped)}")
    target.finish()
    if lost:
        logger.warning("%s: not written, layout %s has no place for it: %s", goal, to, ", ".join(sorted(lost)))
    return ConversionReport(goal, written, kept, tuple(skipped))


def _read(latents: StoredLatents, indices: Sequence[int], skipped: list[Problem], on_error: str) -> list[LatentItem]:
    items = []
    for index in indices:
        try:
            items.append(latents.read(index))
        except LatentItemError as error:
            if on_error == "raise":
                raise
            skipped.append(Problem(latents.names[index], str(error).removeprefix(f"{latents.names[index]}: ")))
    return items


def _target(to: str, goal: Path, latents: StoredLatents) -> _Target:
    if to == "fastvideo":
        assert latents.statistics is not None
        parquet = FastVideoWriter(goal, latents.statistics)
        return _Target(_ROWS_PER_FILE, lambda number, _: parquet.keep(number), parquet.write, lambda: None)
    if to == "musubi":
        caches = MusubiWriter(goal)
        return _Target(
            1,
            lambda _, indices: caches.keep(latents.names[indices[0]], latents.shapes[indices[0]]),
            lambda _, items: caches.write(items[0]),
            lambda: None,
        )
    native = NativeWriter(goal, latents.statistics)
    return _Target(
        1,
        lambda _, indices: native.keep(latents.names[indices[0]]),
        lambda _, items: native.write(items[0]),
        native.finish,
    )


def _plan(latents: StoredLatents, to: str) -> dict[str, Any]:
    """Everything that must be equal for a conversion to be resumed, but for the files that it reads."""
    listed = json.dumps([latents.names, latents.shapes])
    plan: dict[str, Any] = json.loads(
        json.dumps(
            {
                "from": latents.layout,
                "to": to,
                "items": len(latents),
                "items_sha256": hashlib.sha256(listed.encode()).hexdigest(),
                "normalized": latents.normalized,
                "statistics": None if latents.statistics is None else latents.statistics.to_dict(),
                "rows_per_file": _ROWS_PER_FILE,
            }
        )
    )
    return plan


def _digest_of_files(origin: Path) -> str:
    """Of names, sizes and times of all files of the source: items that were made anew are not those of before."""
    every = [origin] if origin.is_file() else origin.rglob("*")
    files = sorted(path for path in every if path.is_file() and not path.name.startswith("."))
    stats = [(path.relative_to(origin).as_posix(), path.stat()) for path in files]
    listed = json.dumps([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
    return hashlib.sha256(listed.encode(errors="surrogateescape")).hexdigest()


def _require_apart(goal: Path, origin: Path) -> None:
    """Raises ConfigError: one contains the other, or the destination is a file."""
    here, there = goal.resolve(), origin.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise ConfigError(f"source {origin} and destination {goal} must not contain each other.")
    if goal.exists() and not goal.is_dir():
        raise ConfigError(f"the destination {goal} is a file.")


def _claim(goal: Path, plan: dict[str, Any]) -> None:
    """Leave a note of this conversion in an empty destination, or find the one of an interrupted run.

    Raises:
        ConfigError: the destination holds something else.
    """
    note = goal / PLAN
    if note.exists():
        before = read_json(note)
        different = [name for name in plan if before.get(name) != plan[name] and (name in before or name != _FILES)]
        if different:
            raise ConfigError(
                f"{goal} holds another conversion ({PLAN} differs in {', '.join(different)}): of other items, of files "
                "that have changed since, or of another format, normalisation or statistics. Write to another "
                "directory, or delete it."
            )
        return
    if any(not file.name.startswith(".") for file in goal.iterdir()):
        raise ConfigError(f"{goal} is not empty, and not left by an interrupted conversion.")
    save_text(note, json.dumps(plan, indent=1))
