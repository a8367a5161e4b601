"""`salad-compile export --model BASE --salad FILE --output DIR`: a fine-tuned model in the formats of others."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from salad_compile.command_line import model_arguments
from salad_compile.command_line.output import show
from salad_compile.common.files import read_json
from salad_compile.common.paths import as_directory
from salad_compile.common.schema import DIGEST, SummaryFields, decode_file, fields_of
from salad_compile.errors import ConfigError
from salad_compile.exchange.formats import FORMATS
from salad_compile.salad_files.location import file_at
from salad_compile.salad_files.runs import SUMMARY_FILE

HELP = """\
Loads a base model and a SALAD file and writes them in the formats that other programs read, with a model card. LoRA
and merged weights also load without SALAD attention, but then they are not the fine-tuned model: its gates and
projections are in the SALAD file alone.

example:
    salad-compile export --model Wan2.1-T2V-1.3B-Diffusers --salad run/ --output exported
    salad-compile export --model wan --salad run/ --output exported --formats salad diffusers comfyui --json
    salad-compile export --model Wan2.2-T2V-A14B-Diffusers --salad high/ --salad-2 low/ --output exported
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, SALAD file, formats and output directory."""
    model_arguments.add_model(parser, weights=True, option=True)
    group = parser.add_argument_group("the fine-tuned branches")
    group.add_argument("--salad", required=True, metavar="FILE", help="a file, a directory or a Hub repository")
    group.add_argument("--salad-2", metavar="FILE", help="of the second expert, transformer_2 of the same pipeline")
    group = parser.add_argument_group("the export")
    group.add_argument("--output", required=True, metavar="DIR", help="an earlier export there is replaced as a whole")
    known = ", ".join(FORMATS)
    group.add_argument("--formats", nargs="+", metavar="NAME", help=f"of {known}; default: all that can hold the model")
    group.add_argument("--base-model", metavar="NAME", help="for the card: Hub id or name of the base model")
    group.add_argument(
        "--training", metavar="FILE", help="for the card: JSON about the training; default: training.json beside FILE"
    )
    group.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a file of merged weights, 5GB")
    group.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload the export afterwards")
    group.add_argument("--private", action="store_true", help="make the repository private, if it is new")


def run(arguments: argparse.Namespace) -> int:
    """Load, export, report."""
    import salad_compile
    from salad_compile.exchange.export_directory import require_replaceable

    require_replaceable(as_directory(arguments.output).resolve())  # before the model is loaded
    salad = file_at(arguments.salad)  # once: of a run it may warn
    training = _read_training(arguments, salad)
    report = salad_compile.export(
        _model(arguments, salad),
        arguments.output,
        arguments.formats,
        base_model=arguments.base_model,
        training=training,
        max_shard_size=arguments.max_shard_size,
    )
    more = {}
    if arguments.push_to_hub:
        more["commit"] = salad_compile.push_to_hub(
            arguments.output, arguments.push_to_hub, private=arguments.private or None
        )
    show(arguments, report, **more)
    return 0


def _model(arguments: argparse.Namespace, salad: Path) -> Any:
    """The base with its branches, or both experts of a pipeline with theirs."""
    import salad_compile

    first = salad_compile.load(model_arguments.load(arguments), salad)
    if arguments.salad_2 is None:
        return first
    second = model_arguments.load(arguments, component="transformer_2")
    return SimpleNamespace(transformer=first, transformer_2=salad_compile.load(second, arguments.salad_2))


def _read_training(arguments: argparse.Namespace, salad: Path) -> dict[str, Any] | None:
    """What is known of the training: of a run not what an earlier end left beside a newer checkpoint."""
    if arguments.training is not None:
        return read_json(Path(arguments.training))
    file = salad.parent / SUMMARY_FILE
    if not file.is_file():
        return None
    known = fields_of(decode_file(SummaryFields, file, ConfigError))
    return {name: value for name, value in known.items() if name != DIGEST}
