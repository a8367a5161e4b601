"""`salad-compile latents`: encode clips, look at precomputed latents, and convert them between formats."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from salad_compile.command_line.latents_encode import add_encode, encode, list_problems
from salad_compile.command_line.model_arguments import positive
from salad_compile.command_line.output import tell
from salad_compile.latents.layouts import LAYOUTS, WRITABLE

if TYPE_CHECKING:
    from salad_compile.latents.dataset import StoredLatents
    from salad_compile.latents.statistics import LatentStatistics

HELP = """\
Makes a dataset of latents and texts of a folder of videos with captions, looks at one, or converts it between the
formats of trainers.

example:
    salad-compile latents encode clips --model Wan2.1-T2V-1.3B-Diffusers --output data --fps 16 --validation-share 0.05
    salad-compile latents inspect data --sample 100 --json
    salad-compile latents convert musubi_cache data --to salad --skip
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="action", required=True, metavar="{encode,inspect,convert}")
    add_encode(commands)
    inspect = commands.add_parser(
        "inspect",
        help="layout, shapes, statistics and damaged items of a dataset",
        description="Reads a dataset and says what is in it. Exit code 1: items are damaged.",
    )
    inspect.add_argument("path", type=Path, help="directory, or Parquet file")
    inspect.add_argument("--sample", type=positive, metavar="N", help="read only N items, spread over the dataset")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    convert = commands.add_parser(
        "convert",
        help="write a dataset in another format",
        description="Writes a dataset in another format. Run again after an interruption, it resumes where it stopped.",
    )
    convert.add_argument("source", type=Path, help="directory, or Parquet file")
    convert.add_argument("destination", type=Path, help="new or empty directory, or one left by an interrupted run")
    convert.add_argument("--to", choices=WRITABLE, default="salad", help="format to write (default: %(default)s)")
    convert.add_argument("--skip", action="store_true", help="leave damaged items out (default: stop at the first)")
    convert.add_argument("--json", action="store_true", help="print JSON")
    for command in (inspect, convert):
        command.add_argument(
            "--layout", choices=("auto", *LAYOUTS), default="auto", help="format to read (default: %(default)s)"
        )
        command.add_argument(
            "--normalized",
            choices=("yes", "no"),
            help="whether the stored latents are normalised (default: what the format says)",
        )
        command.add_argument(
            "--statistics",
            metavar="NAME|PATH",
            help="of the VAE: wan2.1, hunyuanvideo, the directory of a pipeline or of its VAE, its config.json, or a "
            "JSON file with mean and std per channel (default: what the format implies)",
        )


def run(arguments: argparse.Namespace) -> int:
    """The exit code. Raises SaladError or OSError."""
    return {"encode": encode, "inspect": _inspect, "convert": _convert}[arguments.action](arguments)


def _inspect(arguments: argparse.Namespace) -> int:
    from salad_compile.latents.checking import check, doubt_reading, evenly_spaced
    from salad_compile.latents.opening import open_latents

    latents = open_latents(arguments.path, **_options(arguments), on_error="skip", sample=0)
    indices = None if arguments.sample is None else evenly_spaced(arguments.sample, len(latents))
    checked = check(latents, indices, progress=True)
    measured, question = checked.measured, None
    if measured is not None:
        question = doubt_reading(measured, latents)
    problems = [*latents.problems, *checked.problems]
    found: dict[str, Any] = {
        "path": str(arguments.path),
        "layout": latents.layout,
        "items": len(latents) + len(latents.problems),
        "items_read": len(latents) if indices is None else len(indices),
        "shapes": _histogram(latents),
        "stored_normalized": latents.normalized,
        "mean": None if measured is None else list(measured.mean),
        "std": None if measured is None else list(measured.std),
        "doubt": question,
        "problems": {problem.name: problem.reason for problem in problems},
    }
    tell(arguments, _readable(found), found)
    return 1 if problems else 0


def _histogram(latents: StoredLatents) -> dict[str, int]:
    counts = Counter("x".join(map(str, shape)) for shape in latents.shapes)
    return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))


def _readable(found: dict[str, Any]) -> str:
    stored = "normalised" if found["stored_normalized"] else "not normalised; read as (x - mean) / std"
    lines = [
        f"{found['path']}: layout {found['layout']}, {found['items']} items, {found['items_read']} read",
        f"stored latents: {stored}",
        "shapes (channels x frames x height x width):",
        *(f"  {shape}: {count}" for shape, count in found["shapes"].items()),
    ]
    if found["mean"] is not None:
        lines.append("as they are read, per channel:")
        lines += [f"  {what}: {' '.join(f'{value:.2f}' for value in found[what])}" for what in ("mean", "std")]
        lines.append(f"normalisation: {found['doubt'] or 'as expected'}")
    lines.append(f"damaged items: {len(found['problems']) or 'none'}")
    return "\n".join([*lines, *list_problems(found["problems"])])


def _convert(arguments: argparse.Namespace) -> int:
    from salad_compile.latents.converting import convert_latents

    report = convert_latents(
        arguments.source,
        arguments.destination,
        **_options(arguments),
        to=arguments.to,
        on_error="skip" if arguments.skip else "raise",
    )
    found: dict[str, Any] = {
        "path": str(report.path),
        "written": report.written,
        "kept": report.kept,
        "skipped": {problem.name: problem.reason for problem in report.skipped},
    }
    earlier = f", {report.kept} were there from an earlier run" if report.kept else ""
    lines = [f"{report.path}: {report.written} items written{earlier}, {len(report.skipped)} left out"]
    tell(arguments, "\n".join([*lines, *list_problems(found["skipped"])]), found)
    return 0


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "layout": arguments.layout,
        "normalized": None if arguments.normalized is None else arguments.normalized == "yes",
        "statistics": None if arguments.statistics is None else _statistics(arguments.statistics),
    }


def _statistics(source: str) -> LatentStatistics:
    from salad_compile.command_line.pipeline_source import statistics_of
    from salad_compile.errors import ConfigError
    from salad_compile.latents.encoding.vae import statistics_of_config
    from salad_compile.latents.statistics import KNOWN_STATISTICS, LatentStatistics

    if source in KNOWN_STATISTICS:
        return KNOWN_STATISTICS[source]
    if Path(source).is_dir():
        found = statistics_of(source)
        if found is None:
            raise ConfigError(f"--statistics {source}: no VAE with statistics is there.")
        return found
    try:
        values = json.loads(Path(source).read_text(encoding="utf-8-sig"))
        return statistics_of_config(values) or LatentStatistics.from_dict(values)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else error
        raise ConfigError(
            f"--statistics {source}: {what}. It is {' or '.join(KNOWN_STATISTICS)}, a directory of a pipeline, or "
            "a JSON file with mean and std per channel."
        ) from error
