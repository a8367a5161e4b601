"""`salad-compile train`: convert a model, fine-tune it on precomputed latents, and resume after interruptions."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from salad_compile.command_line.model_arguments import assignments
from salad_compile.command_line.output import tell
from salad_compile.common.files import read_json
from salad_compile.errors import ConfigError, SaladError

if TYPE_CHECKING:
    import torch.nn as nn

    from salad_compile.config import SaladConfig
    from salad_compile.training import TrainResult, TrainSettings

HELP = """\
Fine-tunes a model on precomputed latents and texts: converts it, or takes the branches of --salad, and trains these
alone. Writes log.jsonl, checkpoints/ and in the end salad.safetensors and training.json. Run again, the same command
resumes from the newest checkpoint; SIGTERM and Ctrl-C finish the step and write one (exit code 143, 130). Without
--processes it is one process, or one of those that accelerate's launcher started (DDP, FSDP2). --dry-run takes three
steps, writes nothing, and tells how many hours, and how much memory and disk the run takes on this machine.

example:
    salad-compile train --model Wan2.1-T2V-1.3B-Diffusers --latents data --output run --dry-run
    salad-compile train --model Wan2.1-T2V-1.3B-Diffusers --latents data --output run
    salad-compile train --model wan --latents data --output run --processes 8 --set micro_batch=1 --convert sparsity=0.8
    accelerate launch -m salad_compile.command_line train --model wan --latents data --output run
"""

START_METHOD = "spawn"  # of the processes of --processes; CUDA cannot be used after a fork


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, data, settings and output directory."""
    parser.add_argument("--model", required=True, metavar="MODEL", help="the base model, as `plan` takes it")
    parser.add_argument("--component", default="transformer", metavar="NAME", help="of a pipeline: transformer")
    parser.add_argument("--latents", required=True, metavar="PATH", help="precomputed data, in any known layout")
    parser.add_argument("--validation", metavar="PATH", help="held-out data, for a validation loss")
    parser.add_argument("--output", required=True, metavar="DIR", help="directory of the run")
    parser.add_argument(
        "--processes", type=int, default=1, metavar="N", help="number of processes on this machine (DDP)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="take three steps, and tell what hours, memory and disk the run takes"
    )
    parser.add_argument("--no-resume", action="store_true", help="an error, rather than going on, if there is a run")
    group = parser.add_argument_group("the training", "fields of TrainSettings; later ones win: file, --set, --steps")
    group.add_argument("--settings", metavar="FILE", help="a JSON file of fields")
    group.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="--set learning_rate=5e-5")
    group.add_argument("--steps", type=int, metavar="N", help="optimizer steps, 1600")
    group.add_argument("--forward", metavar="MODULE:FUNCTION", help="for models that are not called as Wan is")
    group = parser.add_argument_group("the conversion", "fields of SaladConfig, unless --salad gives a converted model")
    group.add_argument("--salad", metavar="PATH", help="branches to start from, of `convert` or of another run")
    group.add_argument("--conversion", metavar="FILE", help="a JSON file of fields")
    group.add_argument("--convert", action="append", default=[], metavar="FIELD=VALUE", help="--convert sparsity=0.8")


def run(arguments: argparse.Namespace) -> int:
    """Train. Returns 0 when the run is finished; after a checkpoint that a signal asked for, 128 and its number."""
    if arguments.processes < 1:
        raise ConfigError(f"--processes takes a number of at least 1, got {arguments.processes}.")
    settings, config = settings_of(arguments), config_of(arguments)  # errors in them show before anything is loaded
    if arguments.processes > 1:
        from salad_compile.training.launching import run_processes

        alone = argparse.Namespace(**{**vars(arguments), "processes": 1})
        signal = run_processes(_process, (alone,), arguments.processes, START_METHOD)
        return 128 + signal if signal and not _is_finished(arguments, settings) else 0
    from salad_compile.command_line.model_source import import_name
    from salad_compile.command_line.pipeline_source import statistics_of
    from salad_compile.latents import open_latents
    from salad_compile.training import estimate, train

    vae = statistics_of(arguments.model)
    validation = open_latents(arguments.validation, vae=vae) if arguments.validation else None
    forward = import_name(arguments.forward) if arguments.forward else None
    model, latents = _model(arguments, settings), open_latents(arguments.latents, vae=vae)
    more: dict[str, Any] = {"validation": validation, "config": config, "forward": forward}
    first = os.environ.get("RANK", "0") == "0"
    if arguments.dry_run:
        expected = estimate(model, latents, settings, arguments.output, **more)
        if first:
            tell(arguments, expected.sentence(), expected.to_dict())
        return 0 if expected.disk <= expected.free else 1
    result = train(model, latents, settings, arguments.output, resume=not arguments.no_resume, **more)
    if first:
        _tell(result, settings, arguments)
    return 128 + result.signal if result.signal else 0


def _is_finished(arguments: argparse.Namespace, settings: TrainSettings) -> bool:
    from salad_compile.salad_files.runs import finished_steps

    return finished_steps(Path(arguments.output)) == settings.steps


def settings_of(arguments: argparse.Namespace) -> TrainSettings:
    """The training settings of --settings, --set and --steps.

    Raises:
        ConfigError: an unknown field or a wrong value. OSError: the file cannot be read.
    """
    from salad_compile.training import TrainSettings

    settings = TrainSettings.from_file(arguments.settings) if arguments.settings else TrainSettings()
    changes = assignments(arguments.set, "--set")
    return settings.with_changes(changes if arguments.steps is None else {**changes, "steps": arguments.steps})


def config_of(arguments: argparse.Namespace) -> SaladConfig | None:
    """The configuration of --conversion and --convert; None with --salad.

    Raises:
        ConfigError: an unknown field or a wrong value, or fields beside --salad. OSError: the file cannot be read.
    """
    from salad_compile.config import SaladConfig

    if arguments.salad:
        if arguments.conversion or arguments.convert:
            raise ConfigError(f"{arguments.salad} says how the model is converted: leave --conversion, --convert out.")
        return None
    values = read_json(Path(arguments.conversion)) if arguments.conversion else {}
    return SaladConfig.from_dict({**values, **assignments(arguments.convert, "--convert")})


def _model(arguments: argparse.Namespace, settings: TrainSettings) -> nn.Module:
    from salad_compile.command_line.model_source import load_model
    from salad_compile.salad_files.salad_file import load
    from salad_compile.training.preparation import DTYPES

    model = load_model(arguments.model, dtype=DTYPES[settings.precision], component=arguments.component)
    return load(model, arguments.salad) if arguments.salad else model


def _tell(result: TrainResult, settings: TrainSettings, arguments: argparse.Namespace) -> None:
    file = None if result.file is None else str(result.file)
    sentence = (
        f"wrote {file}: {result.step} steps, loss {result.loss}\n{result.outcome.sentence()}; next: {_next(arguments)}"
    )
    if not result.finished:
        sentence = (
            f"stopped after step {result.step} of {settings.steps}, which {result.checkpoint} holds: the same command "
            "resumes it"
        )
    checkpoint = None if result.checkpoint is None else str(result.checkpoint)
    values = {**dataclasses.asdict(result), "outcome": result.outcome.to_dict()}
    tell(arguments, sentence, {**values, "file": file, "checkpoint": checkpoint})


def _next(arguments: argparse.Namespace) -> str:
    """The command that makes files for other programs of the run."""
    output = f"{Path(arguments.output)}-exported"
    words = ["salad-compile", "export", "--model", arguments.model, "--salad", arguments.output, "--output", output]
    if arguments.component != "transformer":
        words[4:4] = ["--component", arguments.component]
    return shlex.join(words)


def _process(arguments: argparse.Namespace) -> None:
    """One of several processes. The first one that sees a mistake of the user prints one line about it."""
    from salad_compile.command_line.logging_setup import logs_on_stderr
    from salad_compile.common.progress import quiet

    with logs_on_stderr(verbose=arguments.verbose, silent=arguments.quiet), quiet(arguments.quiet):
        try:
            run(arguments)
        except (SaladError, OSError) as error:
            print(f"salad-compile: error: {error}", file=sys.stderr)
            sys.exit(2)
