"""Finding a SALAD file: a path, a directory, or a repository on the Hugging Face Hub."""

from __future__ import annotations

import os
from pathlib import Path

from salad_compile.common.inside import require_inside
from salad_compile.errors import CorruptFileError, HubError

FILE_NAME = "salad.safetensors"


def file_at(path: str | os.PathLike[str]) -> Path:
    """The SALAD file that `path` means: a file, a directory that holds one, or the id of a repository on the Hub.

    Raises:
        FileNotFoundError: there is no such file. HubError: the download broke off.
    """
    local = Path(path)
    if local.is_dir():
        return _find_in(local)
    if local.exists():
        return local
    name = os.fspath(path)
    if not is_repository_id(name):
        raise FileNotFoundError(f"no SALAD file at {local}")
    return _download(name)


def is_repository_id(text: str) -> bool:
    """Whether the text has the form `owner/name` of a Hub repository; the Hub is not asked."""
    return text.count("/") == 1 and not text.startswith((".", "/", "~")) and not text.endswith(("/", ".safetensors"))


def _find_in(directory: Path) -> Path:
    file = directory / FILE_NAME
    if not file.exists():
        deeper = sorted(str(found.parent) for found in directory.glob(f"*/{FILE_NAME}"))
        hint = f" An export of several models has one for each: pass {' or '.join(deeper)}." if deeper else ""
        raise FileNotFoundError(f"no SALAD file at {file}.{hint}")
    try:
        return require_inside(directory, file)
    except ValueError as error:
        raise CorruptFileError(f"{directory}: {error}.") from error


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
