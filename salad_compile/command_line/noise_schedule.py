"""The timestep shift of `train`: what the user says, else that of the pipeline's scheduler, else the default."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from salad_compile.command_line.model_arguments import assignments
from salad_compile.command_line.model_source import PIPELINE_INDEX
from salad_compile.common.files import read_json
from salad_compile.errors import ConfigError

if TYPE_CHECKING:
    from salad_compile.training import TrainSettings

SCHEDULER = Path("scheduler") / "scheduler_config.json"
_SHIFT = "flow_shift"


def with_schedule(
    arguments: argparse.Namespace, settings: TrainSettings, shapes: Sequence[Sequence[int]], *, told: bool
) -> TrainSettings:
    """The settings with the noise schedule of the pipeline's scheduler, as far as the user has not set it.

    Args:
        shapes: of the latents, (C, T, H, W). told: say on stderr where the shift is from.

    Raises:
        ConfigError: the scheduler's configuration states no possible shift.
    """
    from salad_compile.training.schedules import schedule_of

    file, given = _scheduler_of(Path(arguments.model)), _given(arguments)
    tokens = max((shape[1] * shape[2] * shape[3] for shape in shapes), default=1)
    try:
        stated = {} if file is None else schedule_of(read_json(file), tokens)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error} Set it yourself: --set {_SHIFT}=3.0.") from error
    changes = {name: value for name, value in stated.items() if name not in given}
    if told:
        if _SHIFT in given:
            source = "as it was set"
        elif _SHIFT in changes:
            source = f"of {file}; --set {_SHIFT}=... sets another"
        else:
            source = f"the default, since no scheduler of a pipeline states one; --set {_SHIFT}=... sets another"
        print(f"{_SHIFT} {changes.get(_SHIFT, settings.flow_shift):.4g}, {source}", file=sys.stderr, flush=True)
    return settings.with_changes(changes)


def _given(arguments: argparse.Namespace) -> set[str]:
    """Names of the settings that the user has set."""
    file = read_json(Path(arguments.settings)) if arguments.settings else {}
    return {*file, *assignments(arguments.set, "--set")}


def _scheduler_of(source: Path) -> Path | None:
    """The configuration of the scheduler of a pipeline here, of which `source` is the directory, or that of a model."""
    if not source.is_dir():
        return None
    around = source.resolve().parent
    places = [source, *([around] if (around / PIPELINE_INDEX).is_file() else [])]
    return next((place / SCHEDULER for place in places if (place / SCHEDULER).is_file()), None)
