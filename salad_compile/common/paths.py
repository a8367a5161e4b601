"""What a path may name: text that the system takes, and files that are read and replaced as a whole."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from salad_compile.errors import ConfigError, WriteError


def as_path(path: str | bytes | os.PathLike[str]) -> Path:
    """A path from the caller.

    Raises:
        ConfigError: it is no path, is empty, or no file can have its name.
    """
    try:
        text = os.fsdecode(path)
        name = os.fsencode(text)
    except TypeError as error:
        raise ConfigError(f"a path is text or an os.PathLike, got {path!r}.") from error
    except UnicodeEncodeError as error:
        raise ConfigError(f"{path!r} is no name of a file.") from error
    if not name:
        raise ConfigError("a path is empty: write . for the directory that you are in.")
    if b"\0" in name:
        raise ConfigError(f"{text!r} is no name of a file.")
    return Path(text)


def as_directory(path: str | bytes | os.PathLike[str]) -> Path:
    """As :func:`as_path`, of a directory that is written to and need not exist: what must be known before long work.

    Raises:
        ConfigError: it is a file, too. WriteError: it, or what it would be made in, cannot be written to.
    """
    found = as_path(path)
    there = next(place for place in _upwards(found) if place.exists())
    if not there.is_dir():
        raise ConfigError(f"{there} is a file: name a directory.")
    if not os.access(there, os.W_OK | os.X_OK):
        failure = WriteError(f"{there} cannot be written to: name a directory elsewhere, or change its permissions.")
        failure.errno = errno.EACCES
        raise failure
    return found


def nearest_directory(path: Path) -> Path:
    """The directory itself, or the nearest one above it that exists."""
    return next(place for place in _upwards(path) if place.is_dir())


def _upwards(path: Path) -> tuple[Path, ...]:
    """The path and all above it; the last one, the root, is there."""
    return (path.absolute(), *path.absolute().parents)


def require_regular(path: Path, *, follow: bool = True) -> None:
    """Raises OSError for a device, a pipe or a socket, without opening it.

    A pipe that is read waits for ever for its writer. A device that a file takes the place of is gone, `/dev/null` for
    every process of the machine.

    Args:
        follow: whether what a link leads to counts, or the link, which is none of these.
    """
    try:
        mode = path.stat(follow_symlinks=follow).st_mode
    except FileNotFoundError:
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode)):
        raise OSError(errno.EINVAL, "it is a device, a pipe or a socket, and no file", str(path))
