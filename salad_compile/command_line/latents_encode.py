"""`salad-compile latents encode`: a folder of videos with captions becomes a dataset of latents and texts."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from salad_compile.command_line.model_arguments import DEFAULT_PIXELS, device_of, positive
from salad_compile.command_line.output import tell
from salad_compile.common.paths import as_directory
from salad_compile.common.reports import plural

DTYPES = ("bfloat16", "float16", "float32")
DESCRIPTION = """\
Encodes every video below CLIPS (mp4, webm, gif, mov, mkv, avi, and folders of images) and its caption with the VAE and
the text encoders of a pipeline. Captions are .txt files beside the videos, or a table. Run again, it goes on where it
stopped, and takes up clips that were added or changed. Clips that cannot be encoded are skipped and named. For VACE,
cat.control.mp4, cat.mask.png and cat.reference.png beside cat.mp4 are its control video, mask and reference.
"""


def add_encode(commands: Any) -> None:
    """The parser of this command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "encode",
        help="make a dataset of a folder of videos with captions",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("clips", type=Path, metavar="CLIPS", help="folder of videos, or of folders of images")
    parser.add_argument("--model", required=True, metavar="PIPELINE", help="directory of a pipeline, or owner/name")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="new, empty, or of an earlier run")
    frames, height, width = DEFAULT_PIXELS
    group = parser.add_argument_group("what is cut out of each clip")
    group.add_argument(
        "--frames",
        type=positive,
        nargs="+",
        default=[frames],
        metavar="N",
        help="from the first frame on; of several numbers the largest that the clip has (default: %(default)s)",
    )
    group.add_argument("--height", type=positive, default=height, metavar="N", help="pixels (default: %(default)s)")
    group.add_argument("--width", type=positive, default=width, metavar="N", help="pixels (default: %(default)s)")
    group.add_argument(
        "--fps", type=float, metavar="F", help="drop or repeat frames to this rate (default: as recorded)"
    )
    group.add_argument(
        "--buckets",
        action="store_true",
        help="clips keep about their shape, at about height x width pixels in all (default: all get that size)",
    )
    group = parser.add_argument_group("captions")
    group.add_argument(
        "--captions",
        type=Path,
        metavar="FILE",
        help="a .csv or .jsonl table (default: metadata, captions or dataset .jsonl or .csv in CLIPS, and .txt files)",
    )
    group.add_argument("--caption-column", metavar="NAME", help="of the table (default: caption, text or prompt)")
    group.add_argument("--file-column", metavar="NAME", help="of the table (default: file_name, video, path, ...)")
    group = parser.add_argument_group("the run")
    group.add_argument(
        "--validation-share",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="part of the clips that goes to DIR/validation, 0.05 (default: none)",
    )
    group.add_argument("--device", metavar="NAME", help="cuda, cuda:1, cpu (default: the GPU if there is one)")
    group.add_argument(
        "--dtype", choices=DTYPES, default="bfloat16", help="of the text encoders; the VAE is float32 (%(default)s)"
    )
    group.add_argument("--tiling", action="store_true", help="let the VAE work in tiles, which takes less memory")
    group.add_argument("--json", action="store_true", help="print JSON")


def encode(arguments: argparse.Namespace) -> int:
    """The exit code. Raises SaladError or OSError."""
    from salad_compile.latents.encoding.finding import find_clips, require_apart
    from salad_compile.latents.encoding.sizes import ClipSize

    as_directory(arguments.output)  # before the encoders are loaded
    size = ClipSize(
        tuple(arguments.frames), arguments.height, arguments.width, arguments.fps, buckets=arguments.buckets
    )
    clips = find_clips(
        arguments.clips,
        captions=arguments.captions,
        file_column=arguments.file_column,
        caption_column=arguments.caption_column,
    )
    require_apart(arguments.output, clips.folder)
    import torch

    from salad_compile.command_line.pipeline_source import load_encoders
    from salad_compile.latents.encoding.encode import encode_clips
    from salad_compile.latents.encoding.pipeline import PipelineEncoder

    pipeline, config = load_encoders(
        arguments.model,
        device=device_of(arguments),
        dtype=getattr(torch, arguments.dtype),
        tiling=arguments.tiling,
    )
    report = encode_clips(
        clips,
        PipelineEncoder(pipeline, config),
        arguments.output,
        size=size,
        validation_share=arguments.validation_share,
    )
    found: dict[str, Any] = {
        "path": str(report.path),
        "validation": None if report.validation is None else str(report.validation),
        "written": report.written,
        "kept": report.kept,
        "held_out": report.held_out,
        "skipped": {problem.name: problem.reason for problem in report.skipped},
    }
    earlier = f", {report.kept} were there from an earlier run" if report.kept else ""
    held_out = "" if report.validation is None else f"; {report.held_out} of them held out in {report.validation}"
    line = f"{report.path}: {plural(report.written, 'clip')} encoded{earlier}{held_out}; {len(report.skipped)} skipped"
    tell(arguments, "\n".join([line, *list_problems(found["skipped"])]), found)
    return 0


def list_problems(problems: Mapping[str, str]) -> list[str]:
    """One line for each item that cannot be used."""
    return [f"  {name}: {reason}" for name, reason in problems.items()]
