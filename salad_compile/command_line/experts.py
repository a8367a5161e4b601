"""Which transformers of a pipeline `train` trains, each on what noise: the two experts of Wan2.2, or the only one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from salad_compile.command_line.model_source import PIPELINE_INDEX, pipeline_components
from salad_compile.common.files import read_json
from salad_compile.errors import ConfigError

if TYPE_CHECKING:
    from salad_compile.training import TrainSettings

FIRST, SECOND = "transformer", "transformer_2"  # the first takes the noise from the boundary up


class Expert(NamedTuple):
    """One transformer to train: its name in the pipeline, its settings, and the directory of its run."""

    component: str
    settings: TrainSettings
    output: Path


def experts_of(arguments: argparse.Namespace, settings: TrainSettings) -> list[Expert]:
    """One run for each transformer that the arguments ask for; of a pipeline with two, both unless --component says.

    Raises:
        ConfigError: nothing says which noise an expert is for, or a first frame is for another model.
    """
    output, names = Path(arguments.output), pipeline_components(arguments.model)
    if names and settings.first_frame_conditioning_p:
        _require_first_frame(arguments.model)
    if len(names) < 2:
        return [Expert(arguments.component or FIRST, settings, output)]
    chosen = [arguments.component] if arguments.component else names
    if (settings.lowest_noise, settings.highest_noise) != (0.0, 1.0):
        _require_one(chosen, arguments, "a range of noise")
        return [Expert(chosen[0], settings, output)]
    if arguments.salad:
        _require_one(chosen, arguments, "--salad")
    boundary = read_json(Path(arguments.model) / PIPELINE_INDEX).get("boundary_ratio")
    if boundary is None:
        raise ConfigError(
            f"{arguments.model} has two experts, and its {PIPELINE_INDEX} has no boundary_ratio, which says where the "
            "noise of one ends: give the range of one, --component transformer --set lowest_noise=0.875."
        )
    if isinstance(boundary, bool) or not isinstance(boundary, (int, float)) or not 0 < boundary < 1:
        raise ConfigError(
            f"the boundary_ratio of {arguments.model}, in its {PIPELINE_INDEX}, is {boundary!r}: where the noise of "
            "one expert ends and that of the other begins is a number between 0 and 1, 0.875 of Wan2.2."
        )
    ranges = {FIRST: {"lowest_noise": boundary}, SECOND: {"highest_noise": boundary}}
    return [
        Expert(name, settings.with_changes(ranges[name]), output if len(chosen) == 1 else output / name)
        for name in chosen
    ]


def _require_first_frame(model: str) -> None:
    """Raises ConfigError: it is a pipeline of Wan that gives no first frame in the place of a noisy one."""
    index = read_json(Path(model) / PIPELINE_INDEX)
    if str(index.get("_class_name")).startswith("Wan") and not index.get("expand_timesteps"):
        raise ConfigError(
            f"{model} is no TI2V (its {PIPELINE_INDEX} does not say expand_timesteps): it knows one timestep for all "
            "frames, so leave first_frame_conditioning_p out."
        )


def _require_one(chosen: list[str], arguments: argparse.Namespace, what: str) -> None:
    if len(chosen) > 1:
        raise ConfigError(
            f"{arguments.model} has two experts, and {what} is for one of them: say which, --component {FIRST} or "
            f"--component {SECOND}."
        )
