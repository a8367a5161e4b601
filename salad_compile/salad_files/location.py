"""Finding a SALAD file: a path, a directory, or a repository on the Hugging Face Hub."""

from __future__ import annotations

import os
from pathlib import Path

from salad_compile.common.inside import require_inside
from salad_compile.common.logs import logger
from salad_compile.common.paths import as_path
from salad_compile.errors import CorruptFileError, HubError
from salad_compile.salad_files.runs import complete_checkpoints, finished_steps

FILE_NAME = "salad.safetensors"


def file_at(path: str | os.PathLike[str]) -> Path:
    """The SALAD file that `path` means: a file, a directory that holds one, or the id of a repository on the Hub.

    Of the directory of a run of training it is the newest complete state: the result, or else a checkpoint.

    Raises:
        FileNotFoundError: there is no such file. ConfigError: it is no path. HubError: the download broke off.
    """
    local = as_path(path)
    try:
        there = local.exists()
    except OSError as error:  # a name that is too long
        raise FileNotFoundError(f"no SALAD file at {local}: {error.strerror}") from error
    if local.is_dir():
        return _find_in(local)
    if there:
        if local.name == FILE_NAME:
            _warn_of_newer(local)
        return local
    name = str(local)
    if not is_repository_id(name):
        raise FileNotFoundError(f"no SALAD file at {local}")
    return _download(name)


def is_repository_id(text: str) -> bool:
    """Whether the text has the form `owner/name` of a Hub repository; the Hub is not asked."""
    return text.count("/") == 1 and not text.startswith((".", "/", "~")) and not text.endswith(("/", ".safetensors"))


def _find_in(directory: Path) -> Path:
    """The file of a directory; of a run of training that of its newest complete state, and a warning says which."""
    file = _newest_of_run(directory) or directory / FILE_NAME
    if not file.exists():
        deeper = sorted(str(found.parent) for found in directory.glob(f"*/{FILE_NAME}"))
        hint = f" An export of several models has one for each: pass {' or '.join(deeper)}." if deeper else ""
        raise FileNotFoundError(f"no SALAD file at {file}.{hint}")
    try:
        return require_inside(directory, file)
    except ValueError as error:
        raise CorruptFileError(f"{directory}: {error}.") from error


def _newest_of_run(directory: Path) -> Path | None:
    """The file of a run's newest checkpoint, unless the run is finished and its result is as new."""
    found = complete_checkpoints(directory)
    if not found:
        return None
    newest, steps = found[-1], finished_steps(directory)
    if _is_current(directory, newest.step, steps):
        return None
    state = "is not finished" if steps is None else f"went on after step {steps}"
    logger.warning("the run in %s %s: its newest checkpoint is taken, %s", directory, state, newest.path)
    return newest.path / FILE_NAME


def _is_current(directory: Path, newest: int, steps: int | None) -> bool:
    """Whether the result of a run is as new as its newest checkpoint."""
    return (directory / FILE_NAME).is_file() and steps is not None and steps >= newest


def _warn_of_newer(file: Path) -> None:
    """The caller names the file, and gets it."""
    found = complete_checkpoints(file.parent)
    if found and not _is_current(file.parent, found[-1].step, finished_steps(file.parent)):
        logger.warning("%s is not of the run's newest state, which is left out: %s", file, found[-1].path)


def _download(repository: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError

    try:
        return Path(hf_hub_download(repository, FILE_NAME))
    except (EntryNotFoundError, HFValidationError, RepositoryNotFoundError) as error:
        raise FileNotFoundError(
            f"{repository!r} is neither a file nor a directory here, and {FILE_NAME} could not be downloaded from a "
            f"Hub repository of that name: {error}"
        ) from error
    except Exception as error:  # the classes of the HTTP library, which changes between releases of huggingface_hub
        raise HubError(
            f"the download of {FILE_NAME} from {repository!r} broke off, and the model is unchanged: "
            f"{type(error).__name__}: {error}. Call load again."
        ) from error
