"""Writing files and directories as a whole or not at all, and reading JSON."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from salad_compile.common.schema import LARGEST_FILE
from salad_compile.errors import ConfigError, SaladError, WriteError


@contextlib.contextmanager
def write_at_once(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target`, which is renamed to it at the end, or removed if anything fails.

    Raises:
        WriteError: an OSError, or what safetensors makes of one; its `errno` is kept.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.partial")
    with name_failures(target):
        try:
            temporary.touch()
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(mode)  # safetensors 0.8 makes files that only their owner can read
            temporary.replace(target)
        finally:
            with contextlib.suppress(NotADirectoryError):  # a file stands where the directory should be
                temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def write_directory_at_once(target: Path) -> Iterator[Path]:
    """Yield an empty temporary directory beside `target`; renamed to it at the end, or removed if anything fails.

    An existing directory at `target` is replaced as a whole. No portable call exchanges two directories: the old one is
    set aside first, and put back if the new one cannot take its name.

    Raises:
        WriteError: as :func:`write_at_once`.
    """
    temporary, aside = (target.with_name(f".{target.name}.{os.getpid()}.{kind}") for kind in ("partial", "before"))
    with name_failures(target):
        temporary.mkdir(parents=True)
        mode = temporary.stat().st_mode & 0o666
        try:
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    file.chmod(mode)
                    flush_to_disk(file)
            if not target.exists():
                temporary.rename(target)
                return
            target.rename(aside)
            try:
                temporary.rename(target)
            except BaseException:
                aside.rename(target)
                raise
            shutil.rmtree(aside, ignore_errors=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def flush_to_disk(path: Path) -> None:
    """Wait until a file or a directory is on the disk; some file systems report only now that the disk is full."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ConfigError: it holds something else. OSError: it cannot be read.
    """
    size = path.stat().st_size
    if size > LARGEST_FILE:
        raise ConfigError(f"{path} is not a file of settings: it has {size:,} bytes.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not a JSON file: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold an object with names and values, and holds a {type(values).__name__}.")
    return values


@contextlib.contextmanager
def name_failures(target: Path) -> Iterator[None]:
    """Turn what a full disk or a forbidden directory raises into a WriteError that names `target`."""
    try:
        yield
    except SaladError:
        raise
    except OSError as error:
        raise _write_error(target, error, error.errno) from error
    except Exception as error:
        # safetensors 0.8 wraps errors of the operating system in a class of its own, which is not an OSError
        code = re.search(r"os error (\d+)", str(error)) if type(error).__name__ == "SafetensorError" else None
        if code is None:
            raise
        raise _write_error(target, error, int(code[1])) from error


def _write_error(target: Path, cause: Exception, errno: int | None) -> WriteError:
    error = WriteError(f"{target} could not be written; what was there before is as it was: {cause}")
    error.errno = errno
    return error
