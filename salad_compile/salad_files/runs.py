"""The checkpoints in the directory of a run of training: which are complete, and which is the newest."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from salad_compile.common.logs import logger
from salad_compile.common.schema import StateFields, StateVersion, SummaryFields, decode_file
from salad_compile.errors import CheckpointError, CorruptFileError, FormatVersionError

FOLDER = "checkpoints"
STATE_FILE = "state.json"
TENSORS_FILE = "training.safetensors"
SUMMARY_FILE = "training.json"  # of a finished run
STATE_VERSION = 1
_NAME = re.compile(r"step-\d{8,}")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk. step: optimizer steps taken."""

    path: Path
    step: int
    state: StateFields


def checkpoint_name(step: int) -> str:
    """Of the checkpoint's directory: names in order are steps in order."""
    return f"step-{step:08d}"


def checkpoint_paths(directory: Path) -> list[Path]:
    """What has the name of a checkpoint in a run's directory, the newest last; a copy under another name has not."""
    return sorted(path for path in (directory / FOLDER).glob("step-*") if _NAME.fullmatch(path.name))


def complete_checkpoints(directory: Path) -> list[Checkpoint]:
    """The complete checkpoints of a run, the newest last; a warning names damaged ones.

    Raises:
        FormatVersionError: one was written by another release.
    """
    found = []
    for path in checkpoint_paths(directory):
        try:
            found.append(read_checkpoint(path))
        except FormatVersionError:
            raise
        except (OSError, CheckpointError) as error:
            logger.warning("%s is not a complete checkpoint and is skipped: %s", path, error)
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a directory; its files are there and have their sizes, and are not read.

    Raises:
        CorruptFileError, OSError: it is not complete. FormatVersionError: it was written by another release.
    """
    version = decode_file(StateVersion, path / STATE_FILE, CorruptFileError).version
    if version != STATE_VERSION:
        raise FormatVersionError(f"{path} has version {version}, this release reads {STATE_VERSION}.")
    state = decode_file(StateFields, path / STATE_FILE, CorruptFileError)
    if path.name != checkpoint_name(state.step):
        raise CorruptFileError(f"its {STATE_FILE} is of step {state.step}")
    for name, size in state.files.items():
        if Path(name).name != name:
            raise CorruptFileError(f"its {STATE_FILE} names {name!r}, which is no file of it")
        there = (path / name).stat().st_size
        if there != size:
            raise CorruptFileError(f"{name} has {there} bytes instead of {size}")
    return Checkpoint(path, state.step, state)


def is_complete(path: Path) -> bool:
    """Whether :func:`read_checkpoint` takes the directory."""
    try:
        return read_checkpoint(path).path == path
    except (OSError, CheckpointError):
        return False


def finished_steps(directory: Path) -> int | None:
    """The steps of a run that is finished; None for another directory.

    Raises:
        CorruptFileError: `training.json` is damaged.
    """
    file = directory / SUMMARY_FILE
    return decode_file(SummaryFields, file, CorruptFileError).steps if file.is_file() else None
