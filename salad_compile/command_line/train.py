"""`salad-compile train`: convert a model, fine-tune it on precomputed latents, and resume after interruptions."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from salad_compile.command_line.experts import FIRST, Expert, experts_of
from salad_compile.command_line.failures import sentence_of
from salad_compile.command_line.model_arguments import assignments
from salad_compile.command_line.output import tell
from salad_compile.common.files import read_json
from salad_compile.common.paths import as_directory
from salad_compile.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    import torch.nn as nn

    from salad_compile.latents.dataset import OnError, StoredLatents
    from salad_compile.training import TrainResult, TrainSettings

HELP = """\
Fine-tunes a model on precomputed latents and texts: converts it, or takes the branches of --salad, and trains these
alone. Writes log.jsonl, checkpoints/ and in the end salad.safetensors and training.json. Run again, the same command
resumes from the newest checkpoint; SIGTERM, Ctrl-C and a terminal that is closed finish the step and write one (exit
code 143, 130, 129). Without --processes it is one process, or one of those that accelerate's launcher started (DDP,
FSDP2). --dry-run takes three steps, writes nothing, and tells how many hours, and how much memory and disk the run
takes on this machine. Of a pipeline with two experts both are trained, one after the other, each on its own noise
(boundary_ratio).

example:
    salad-compile train --model Wan2.1-T2V-1.3B-Diffusers --latents data --output run --dry-run
    salad-compile train --model Wan2.1-T2V-1.3B-Diffusers --latents data --output run
    salad-compile train --model wan --latents data --output run --processes 8 --set micro_batch=1 --convert sparsity=0.8
    accelerate launch -m salad_compile.command_line train --model wan --latents data --output run
"""

_TOO_SMALL = 75  # exit code of a process whose dry run found too little disk; 1 is that of a crash
START_METHOD = "spawn"  # of the processes of --processes; CUDA cannot be used after a fork


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, data, settings and output directory."""
    parser.add_argument("--model", required=True, metavar="MODEL", help="the base model, as `plan` takes it")
    parser.add_argument(
        "--component", metavar="NAME", help="of a pipeline: transformer or transformer_2; default: all that there are"
    )
    parser.add_argument("--latents", required=True, metavar="PATH", help="precomputed data, in any known layout")
    parser.add_argument("--validation", metavar="PATH", help="held-out data, for a validation loss")
    parser.add_argument(
        "--skip", action="store_true", help="put another item in the place of a damaged one (default: an error)"
    )
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
    group.add_argument("--forward", metavar="MODULE:FUNCTION", help="for models of no family that is known")
    group = parser.add_argument_group("the conversion", "fields of SaladConfig, unless --salad gives a converted model")
    group.add_argument("--salad", metavar="PATH", help="branches to start from, of `convert` or of another run")
    group.add_argument("--conversion", metavar="FILE", help="a JSON file of fields")
    group.add_argument("--convert", action="append", default=[], metavar="FIELD=VALUE", help="--convert sparsity=0.8")


def run(arguments: argparse.Namespace) -> int:
    """Train. Returns 0 when the run is finished; after a checkpoint that a signal asked for, 128 and its number."""
    if arguments.processes < 1:
        raise ConfigError(f"--processes takes a number of at least 1, got {arguments.processes}.")
    settings, config = settings_of(arguments), config_of(arguments)  # errors in them show before anything is loaded
    experts = experts_of(arguments, settings)
    for expert in experts:
        as_directory(expert.output)
    if arguments.processes > 1:
        from salad_compile.training.feeding import require_divisible
        from salad_compile.training.launching import run_processes

        require_divisible(settings, arguments.processes)  # before so many are started
        alone = argparse.Namespace(**{**vars(arguments), "processes": 1})
        try:
            signal = run_processes(_process, (alone,), arguments.processes, START_METHOD)
        except TrainingError as error:
            if getattr(error.__cause__, "exit_code", None) == _TOO_SMALL:
                return 1
            raise
        finished = all(_is_finished(expert) for expert in experts)
        return 128 + signal if signal and not finished else 0
    if arguments.dry_run:
        return _estimate_all(arguments, experts, config)
    for expert in experts:
        code = _train_one(arguments, expert, config)
        if code:
            return code
    if len(experts) > 1 and _is_first():
        print(f"next: {_next_of_both(arguments, experts)}", file=sys.stderr)
    return 0


def _estimate_all(arguments: argparse.Namespace, experts: list[Expert], config: dict[str, Any] | None) -> int:
    """Tell what the training takes, of each expert and of both. Returns 1 if the disk has too little room."""
    from salad_compile.training import estimate
    from salad_compile.training.dry_run import sum_of

    found = {}
    for expert in experts:
        model, latents, settings, more = _given(arguments, expert, config)
        found[expert.component] = estimate(model, latents, settings, expert.output, **more)
        del model, more
    first, whole = next(iter(found.values())), sum_of(found.values())
    sentence, values = first.sentence(), first.to_dict()
    if len(found) > 1:
        parts = [f"{name}\n{textwrap.indent(one.sentence(), '  ')}" for name, one in found.items()]
        sentence = "\n".join([*parts, f"both, one after the other: {whole.sentence()}"])
        values = {**whole.to_dict(), "experts": {name: one.to_dict() for name, one in found.items()}}
    if _is_first():
        tell(arguments, sentence, values)
    return 0 if whole.disk <= whole.free else 1


def _given(
    arguments: argparse.Namespace, expert: Expert, config: dict[str, Any] | None
) -> tuple[nn.Module, StoredLatents, TrainSettings, dict[str, Any]]:
    """Model, data, settings and what else `train` and `estimate` are given for one transformer."""
    from salad_compile.command_line.model_source import import_name
    from salad_compile.command_line.noise_schedule import with_schedule
    from salad_compile.command_line.pipeline_source import load_decoder, statistics_of
    from salad_compile.latents import open_latents

    vae = statistics_of(arguments.model)
    on_error: OnError = "skip" if arguments.skip else "raise"
    validation = open_latents(arguments.validation, vae=vae, on_error=on_error) if arguments.validation else None
    forward = import_name(arguments.forward) if arguments.forward else None
    latents = open_latents(arguments.latents, vae=vae, on_error=on_error)
    told = _is_first() and not arguments.quiet
    settings = with_schedule(arguments, expert.settings, latents.shapes, told=told)
    model = _model(arguments, expert)
    decode = load_decoder(arguments.model) if settings.sample_every else None
    return (
        model,
        latents,
        settings,
        {"validation": validation, "config": config, "forward": forward, "decode": decode},
    )


def _train_one(arguments: argparse.Namespace, expert: Expert, config: dict[str, Any] | None) -> int:
    """Train one transformer. Returns 0, or after a signal 128 and its number."""
    from salad_compile.training import train

    model, latents, settings, more = _given(arguments, expert, config)
    result = train(model, latents, settings, expert.output, resume=not arguments.no_resume, **more)
    if _is_first():
        _tell(result, expert._replace(settings=settings), arguments)
    return 128 + result.signal if result.signal else 0


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _is_finished(expert: Expert) -> bool:
    from salad_compile.salad_files.runs import finished_steps

    return finished_steps(expert.output) == expert.settings.steps


def settings_of(arguments: argparse.Namespace) -> TrainSettings:
    """The training settings of --settings, --set and --steps.

    Raises:
        ConfigError: an unknown field or a wrong value. OSError: the file cannot be read.
    """
    from salad_compile.training import TrainSettings

    settings = TrainSettings.from_file(arguments.settings) if arguments.settings else TrainSettings()
    changes = assignments(arguments.set, "--set")
    return settings.with_changes(changes if arguments.steps is None else {**changes, "steps": arguments.steps})


def config_of(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """The fields of :class:`SaladConfig` that --conversion and --convert give; None with --salad.

    Raises:
        ConfigError: an unknown field or a wrong value, or fields beside --salad. OSError: the file cannot be read.
    """
    from salad_compile.config import SaladConfig

    if arguments.salad:
        if arguments.conversion or arguments.convert:
            raise ConfigError(f"{arguments.salad} says how the model is converted: leave --conversion, --convert out.")
        return None
    values = read_json(Path(arguments.conversion)) if arguments.conversion else {}
    given = {**values, **assignments(arguments.convert, "--convert")}
    SaladConfig.from_dict(given)  # what is wrong shows before anything is loaded
    return given


def _model(arguments: argparse.Namespace, expert: Expert) -> nn.Module:
    from salad_compile.command_line.model_source import load_model
    from salad_compile.salad_files.salad_file import load
    from salad_compile.training.preparation import DTYPES

    model = load_model(arguments.model, dtype=DTYPES[expert.settings.precision], component=expert.component)
    return load(model, arguments.salad) if arguments.salad else model


def _tell(result: TrainResult, expert: Expert, arguments: argparse.Namespace) -> None:
    file = None if result.file is None else str(result.file)
    loss = "not finite in the last step, which was left out" if result.loss is None else result.loss
    sentence = f"wrote {file}: {result.step} steps, loss {loss}\n{result.outcome.sentence()}; next: "
    sentence += _next(arguments, expert)
    if not result.finished:
        sentence = (
            f"stopped after step {result.step} of {expert.settings.steps}, which {result.checkpoint} holds: the same "
            "command resumes it"
        )
    checkpoint = None if result.checkpoint is None else str(result.checkpoint)
    values = {**dataclasses.asdict(result), "outcome": result.outcome.to_dict()}
    tell(arguments, sentence, {**values, "file": file, "checkpoint": checkpoint})


def _next(arguments: argparse.Namespace, expert: Expert) -> str:
    """The command that makes files for other programs of the run."""
    words = ["salad-compile", "export", "--model", arguments.model]
    words += [] if expert.component == FIRST else ["--component", expert.component]
    return shlex.join([*words, "--salad", str(expert.output), "--output", f"{expert.output}-exported"])


def _next_of_both(arguments: argparse.Namespace, experts: list[Expert]) -> str:
    """As :func:`_next`, of both experts in one directory."""
    first, second = (str(expert.output) for expert in experts)
    words = ["salad-compile", "export", "--model", arguments.model, "--salad", first, "--salad-2", second]
    return shlex.join([*words, "--output", f"{Path(arguments.output)}-exported"])


def _process(arguments: argparse.Namespace) -> None:
    """One of several processes. The first one that sees a mistake of the user prints one line about it."""
    from salad_compile.command_line.logging_setup import logs_on_stderr
    from salad_compile.common.progress import quiet

    with logs_on_stderr(verbose=arguments.verbose, silent=arguments.quiet), quiet(arguments.quiet):
        try:
            code = run(arguments)
        except Exception as error:
            said = sentence_of(error)
            if said is None:
                raise
            print(f"salad-compile: error: {said}", file=sys.stderr)
            sys.exit(2)
    if arguments.dry_run and code:
        sys.exit(_TOO_SMALL)
