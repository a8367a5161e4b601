"""open_latents: finds the layout of a path and how its latents are normalised."""

from __future__ import annotations

import importlib
import os
from collections import Counter
from pathlib import Path
from typing import Any, Literal

from salad_compile.common.logs import logger
from salad_compile.common.paths import as_path
from salad_compile.errors import ConfigError, LatentItemError, LatentLayoutError, did_you_mean
from salad_compile.latents.checking import check, doubt_reading, evenly_spaced, require_no_contradiction
from salad_compile.latents.dataset import SKIPPING, OnError, StoredLatents, summary_of
from salad_compile.latents.layouts import LAYOUTS, Readable
from salad_compile.latents.source import LatentSource
from salad_compile.latents.statistics import LatentStatistics

SOURCES: dict[str, Any] = {
    name: getattr(importlib.import_module(f"salad_compile.latents.{layout.module}"), layout.reader)
    for name, layout in LAYOUTS.items()
}


def open_latents(
    path: str | os.PathLike[str],
    *,
    layout: Readable | Literal["auto"] = "auto",
    normalized: bool | None = None,
    statistics: LatentStatistics | None = None,
    vae: LatentStatistics | None = None,
    on_error: OnError = "raise",
    sample: int = 8,
) -> StoredLatents:
    """Open precomputed latents and texts. Latents are read when they are asked for.

    Args:
        path: a directory, or a Parquet file.
        layout: "salad" (our own), "fastvideo", "musubi", "finetrainers", "aitoolkit", "diffsynth", "diffusionpipe" or
            "ltx"; "auto" looks at the names of files.
        normalized: whether the stored latents are normalised. None: what the format says; FastVideo's and finetrainers'
            are not. Latents that are not are normalised on reading: (x - mean) / std.
        statistics: of the VAE, for latents that are not normalised. None: what the format implies, which for FastVideo
            and finetrainers is the VAE of Wan 2.1 where there are 16 channels.
        vae: statistics of the VAE of the model that is to be trained. They take the place of what a format only
            implies, and are compared with what its files say.
        on_error: what to do about damaged items: "raise", or "skip" (see :class:`StoredLatents`).
        sample: number of items, spread over the dataset, that are read now; a warning says if they do not look as if
            they were normalised once. 0: none.

    Raises:
        FileNotFoundError: no such path.
        LatentLayoutError: the path holds no known layout, or its index cannot be used.
        LatentItemError: headers or the sample show damaged items (with on_error="raise"), or no good one is left.
        ConfigError: an unknown option, or statistics that are missing, have another number of channels or are not those
            of the model's VAE; or, where nothing says them, latents that look like those of another VAE.
        MissingPackageError: FastVideo's data without pyarrow.
    """
    source = open_source(as_path(path), layout)
    latents = StoredLatents(source, normalized=normalized, statistics=statistics, vae=vae, on_error=on_error)
    logger.info(
        "%s: %d items of layout %s, %s",
        *(path, len(latents), latents.layout),
        "normalised" if latents.normalized else f"normalised on reading with {latents.statistics}",
    )
    if source.left_out:
        logger.warning("%s: not read: %s", path, ", ".join(source.left_out))
    checked = check(latents, evenly_spaced(sample, len(latents)))
    if checked.problems and on_error == "raise":
        raise LatentItemError(f"{summary_of(checked.problems)} {SKIPPING}")
    if checked.measured is not None:
        require_no_contradiction(checked.measured, latents)
        question = doubt_reading(checked.measured, latents)
        if question:
            logger.warning("%s: %s", path, question)
    return latents


def open_source(path: Path, layout: str = "auto") -> LatentSource:
    """The reader for a path; errors as of :func:`open_latents`."""
    if layout != "auto" and layout not in SOURCES:
        valid = ("auto", *SOURCES)
        raise ConfigError(f"layout is one of {', '.join(valid)}; got {layout!r}.{did_you_mean(layout, valid)}")
    if not path.exists():
        raise FileNotFoundError(f"no such file or directory: {path}")
    found = [name for name, source in SOURCES.items() if source.matches(path)]
    wanted = found if layout == "auto" else [name for name in found if name == layout]
    if len(wanted) != 1:
        several = (
            f"more than one layout ({', '.join(wanted)}): pass layout="
            if wanted
            else f"{_describe_content(path)}. Supported:"
        )
        raise LatentLayoutError(
            f"{path} has {several} {'; '.join(f'{name} ({LAYOUTS[name].files})' for name in wanted or SOURCES)}."
            + (f" layout={layout!r} was asked for." if layout != "auto" else "")
        )
    source: LatentSource = SOURCES[wanted[0]](path)
    return source


def _describe_content(path: Path) -> str:
    """What the path holds instead: the number of files of each kind, and the first name."""
    from salad_compile.latents.encoding.finding import VIDEOS

    if path.is_file():
        return f"no known layout; it is a single file of kind {path.suffix or '(none)'}"
    files = sorted(file for file in path.iterdir() if not file.name.startswith("."))
    if not files:
        return "no known layout; it is empty"
    kinds = Counter(file.suffix or ("directory" if file.is_dir() else "no suffix") for file in files)
    caches = sorted({file.stem.removesuffix("_te").rsplit("_", 1)[-1] for file in path.glob("*_te.safetensors")})
    other = f" (caches of musubi-tuner for {', '.join(caches)}?)" if caches else ""
    listed = ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common(4))
    clips = any(file.suffix.lower() in VIDEOS for file in files)
    hint = ": videos, of which `salad-compile latents encode` makes data" if clips else ""
    return f"no known layout; it holds {listed}{other}, the first {files[0].name!r}{hint}"
