"""From the time of a model with one block to that of a whole video: `salad-compile bench CONFIG --video-steps 50`.

Blocks of one kind take the same time, and what surrounds them takes it once. So a model with one block of each kind is
timed, and for each kind one with four; a third of the difference counts as often as the model has further blocks of
that kind. A fine-tuning is timed with one block and with two.

An error in the time of a block counts as often as there are blocks: timed with one and two, each for one forward at a
time, Wan2.1-1.3B came out 6 % too slow. So there are four, and forwards follow each other for a while, as they do in
the whole model, on a GPU whose clocks have settled.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from salad_compile.command_line import model_arguments
from salad_compile.command_line.timing import BenchReport, Timings
from salad_compile.command_line.training_cost import SampleCost
from salad_compile.common.reports import Report, Row
from salad_compile.errors import ConfigError

if TYPE_CHECKING:
    from salad_compile.training.settings import TrainSettings

_COUNTS = re.compile(r"num_(\w+_)?(layers|blocks)|depth(_\w+)?|(\w+_)?n?layers")
FEWEST = 2  # of fewer blocks nothing is saved
MORE = 4  # blocks of the larger of two models that are timed
LEAST_MS = 200.0  # of forwards that follow each other


@dataclass(frozen=True, repr=False)
class VideoReport(Report):
    """Seconds of the denoising of one video, dense and as SALAD, scaled from single blocks.

    Attributes:
        forward_ms: of one forward of the whole model, "dense" and "SALAD". forwards: of one video.
        weights: bytes of the model's parameters. peaks: bytes of one forward beyond them.
        sample: of a fine-tuning; None if it was not measured.
    """

    forward_ms: Mapping[str, float]
    forwards: int
    weights: int
    peaks: Mapping[str, int | None]
    facts: Mapping[str, Any]
    sample: SampleCost | None = None

    title = "the denoising of one video"
    columns = ("attention", "one forward, ms", "one video, s", "memory, GiB", "dense / this")

    def rows(self) -> list[Row]:
        return [self._row(name) for name in self.forward_ms]

    def _row(self, name: str) -> Row:
        peak = self.peaks[name]
        return (
            name,
            f"{self.forward_ms[name]:,.1f}",
            f"{self.seconds(name):,.1f}",
            "not counted" if peak is None else f"{(self.weights + peak) / 2**30:.1f}",
            f"{self.forward_ms['dense'] / self.forward_ms[name]:.2f}x",
        )

    def seconds(self, name: str) -> float:
        """Of one video."""
        return self.forwards * self.forward_ms[name] / 1e3

    def notes(self) -> list[str]:
        blocks = ", ".join(f"{name} {count}" for name, count in self.facts["blocks"].items())
        return [
            f"{self.facts['device']}, torch {self.facts['torch']}, {self.facts['dtype']}, {self.facts['compile']}; "
            f"{self.forwards} forwards; measured on models with one and four blocks, scaled to {blocks}",
            "Text encoder and VAE are not counted.",
            *([] if self.sample is None else [self._training(self.sample)]),
        ]

    def _training(self, sample: SampleCost) -> str:
        recipe, memory = _recipe(), sample.memory(self.weights)
        size = "" if memory is None else f", {memory / 2**30:.1f} GiB"
        hours = sample.hours(recipe.steps * recipe.batch)
        return (
            f"fine-tuning: {sample.milliseconds / 1e3:.2f} s a sample, {hours:,.1f} h for {recipe.steps:,} steps of "
            f"{recipe.batch} samples, one by one{size}; on your own data: salad-compile train --dry-run"
        )

    def to_dict(self) -> dict[str, Any]:
        seconds = {name: self.seconds(name) for name in self.forward_ms}
        more = {"forward_ms": dict(self.forward_ms), "seconds": seconds, "forwards": self.forwards}
        found = {**self.facts, **more, "weight_bytes": self.weights, "peak_bytes": dict(self.peaks)}
        if self.sample is None:
            return found
        samples = _recipe().steps * _recipe().batch
        cost = {"sample_ms": self.sample.milliseconds, "trained_parameters": self.sample.trained}
        hours = {"hours": self.sample.hours(samples), "samples": samples}
        return {**found, "training": {**cost, **hours, "memory_bytes": self.sample.memory(self.weights)}}


def _recipe() -> TrainSettings:
    """The trainer's defaults."""
    from salad_compile.training.settings import TrainSettings

    return TrainSettings()


def time_video(
    arguments: argparse.Namespace,
    measure: Callable[[argparse.Namespace], BenchReport],
    measure_training: Callable[[argparse.Namespace], SampleCost] | None,
) -> VideoReport:
    """Time small models and scale to the whole one.

    Args:
        measure: times the model of the arguments. measure_training: one sample of its training; None: not measured.

    Raises:
        ConfigError: nothing says how many blocks the model has, or the arguments name sites or weights of all of it.
    """
    config = _configuration(arguments)
    counts = {name: count for name, count in config.items() if _is_count(name, count)}
    if not counts:
        raise ConfigError(
            f"the configuration of {arguments.model} says of no kind of block how many there are: time the whole model "
            "(without --video-steps)."
        )
    with tempfile.TemporaryDirectory() as folder:

        def small(**blocks: int) -> argparse.Namespace:
            file = Path(folder) / "config.json"
            file.write_text(json.dumps({**config, **dict.fromkeys(counts, 1), **blocks}))
            changed = {"model": str(file), "config": None, "component": None, "random": True, "least_ms": LEAST_MS}
            return argparse.Namespace(**{**vars(arguments), **changed})

        one = measure(small())
        sizes = {name: min(count, MORE) for name, count in counts.items()}
        more = {name: measure(small(**{name: size})) for name, size in sizes.items()}
        sample = None
        if measure_training is not None:
            first = measure_training(small())
            sample = SampleCost.scaled(first, {name: measure_training(small(**{name: 2})) for name in counts}, counts)
    milliseconds = {}
    for name in ("dense", "SALAD"):
        base = _of(one, name).median
        blocks = {kind: (_of(report, name).median - base) / (sizes[kind] - 1) for kind, report in more.items()}
        milliseconds[name] = base + sum((counts[kind] - 1) * block for kind, block in blocks.items())
    whole = model_arguments.load(arguments, meta=True)
    size = _bytes_of_a_parameter(str(one.facts["dtype"]))
    weights = sum(parameter.numel() for parameter in whole.parameters()) * size
    forwards = arguments.video_steps * (2 if arguments.guidance else 1)
    peaks = {name: _of(one, name).peak_bytes for name in ("dense", "SALAD")}
    return VideoReport(milliseconds, forwards, weights, peaks, {**one.facts, "blocks": counts}, sample)


def _of(report: BenchReport, name: str) -> Timings:
    return report.dense if name == "dense" else report.salad


def _configuration(arguments: argparse.Namespace) -> dict[str, Any]:
    """The model's configuration, as config.json has it."""
    for name in ("salad", "sites", "weights"):
        if getattr(arguments, name):
            raise ConfigError(f"--video-steps times models with fewer blocks: leave --{name} out.")
    settings = model_arguments.settings_of(arguments)
    if settings.dense_layers or settings.overrides:
        raise ConfigError("--video-steps takes all blocks for alike: leave dense_layers and overrides out.")
    found = model_arguments.find_configuration(arguments)
    if ":" in str(arguments.model):
        raise ConfigError("--video-steps takes a config.json or a checkpoint, whose configuration counts the blocks.")
    return dict(found.config)


def _is_count(name: str, value: object) -> bool:
    counts = isinstance(value, int) and not isinstance(value, bool) and value > FEWEST
    return counts and _COUNTS.fullmatch(name) is not None


def _bytes_of_a_parameter(dtype: str) -> int:
    import torch

    return int(getattr(torch, dtype).itemsize)
