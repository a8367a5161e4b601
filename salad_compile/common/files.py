"""Writing files and directories as a whole or not at all, and reading JSON."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from salad_compile.common.locks import hold, is_held
from salad_compile.common.paths import require_regular
from salad_compile.common.schema import LARGEST_FILE
from salad_compile.errors import ConfigError, SaladError, WriteError

ALIVE = ".alive"  # in a directory that is being written: held by its writer, so that others do not remove it


@contextlib.contextmanager
def write_at_once(target: Path, *, held: bool = False) -> Iterator[Path]:
    """Yield a path in a temporary directory beside `target`, which is renamed to it at the end, or removed.

    The directory holds what a library puts beside the file it writes, as safetensors 0.8 does: it goes with it. Writers
    of one directory wait for each other, so that what lies there under a temporary name was left by a dead one, and is
    removed. After a loss of power too the file is there whole or as it was.

    Args:
        held: the caller holds the directory, or one above that all its writers hold.

    Raises:
        WriteError: an OSError, or what safetensors makes of one, its `errno` is kept; or `target` is a device, a pipe
            or a socket.
    """
    temporary = beside(target)
    with name_failures(target):
        require_regular(target, follow=False)
    with name_failures(target), contextlib.nullcontext(False) if held else hold(target.parent) as alone:
        if alone:
            for left in leftovers(target):
                remove(left)
        file = temporary / target.name
        try:
            temporary.mkdir()
            file.touch()
            mode = file.stat().st_mode
            yield file
            file.chmod(mode)  # safetensors 0.8 makes files that only their owner can read
            flush_to_disk(file)
            file.replace(target)
            flush_to_disk(target.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def write_directory_at_once(target: Path) -> Iterator[Path]:
    """Yield a temporary directory beside `target`, renamed to it at the end, or removed if anything fails.

    It is empty but for :data:`ALIVE`. An existing directory at `target` is replaced as a whole: the two exchange their
    names. Where the system cannot do that, the old one is set aside for a moment, and put back if the new one cannot
    take its name, by the next writer if need be. What dead writers have left is removed.

    Raises:
        WriteError: as :func:`write_at_once`.
    """
    with name_failures(target), contextlib.ExitStack() as living:
        require_regular(target, follow=False)
        target.parent.mkdir(parents=True, exist_ok=True)
        with hold(target.parent) as alone:
            if alone:
                _clean_up(target)
            temporary = beside(target)
            temporary.mkdir()
            (temporary / ALIVE).mkdir()
            living.enter_context(hold(temporary / ALIVE))
        mode = temporary.stat().st_mode & 0o666
        try:
            yield temporary
            for path in temporary.rglob("*"):
                if path.is_file():
                    path.chmod(mode)
                flush_to_disk(path)
            with hold(target.parent):
                (temporary / ALIVE).rmdir()
                _take_place(temporary, target)
                flush_to_disk(target.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _take_place(temporary: Path, target: Path) -> None:
    """Give the directory its name; what had it before has the temporary one then, or is gone."""
    if not target.exists():
        temporary.rename(target)
        return
    if exchange(temporary, target):
        return
    aside = beside(target, "before")
    target.rename(aside)
    try:
        temporary.rename(target)
    except BaseException:
        aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _clean_up(target: Path) -> None:
    """Remove what dead writers of `target` have left; if one died between two renames, the old directory comes back."""
    for left in leftovers(target, "before"):
        if target.exists():
            remove(left)
        else:
            left.rename(target)
    for left in leftovers(target):
        if left.is_dir() and not ((left / ALIVE).is_dir() and is_held(left / ALIVE)):
            remove(left)


def exchange(one: Path, other: Path) -> bool:
    """Let two existing paths exchange their names in one step; False where the system cannot.

    Raises:
        OSError: it can, and would not.
    """
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if function is None:
        return False
    here, flag = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if function(here, os.fsencode(one), here, os.fsencode(other), flag) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(other))


def beside(target: Path, kind: str = "partial") -> Path:
    """A hidden name in the same directory that nobody else has: process numbers repeat, in containers and threads."""
    return target.with_name(f".{target.name}.{secrets.token_hex(8)}.{kind}")


def leftovers(target: Path, kind: str = "partial") -> list[Path]:
    """What has a temporary name of `target`, whoever wrote it."""
    start, end = f".{target.name}.", f".{kind}"
    return [path for path in target.parent.iterdir() if path.name.startswith(start) and path.name.endswith(end)]


def remove(left: Path) -> None:
    """Remove a file, a link or a directory with all it holds, if it is still there."""
    if left.is_dir() and not left.is_symlink():
        shutil.rmtree(left, ignore_errors=True)
    else:
        left.unlink(missing_ok=True)


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
    require_regular(path)
    size = path.stat().st_size
    if size > LARGEST_FILE:
        raise ConfigError(f"{path} is not a file of settings: it has {size:,} bytes.")
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))  # editors of Windows put a mark in front
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


def _write_error(target: Path, cause: Exception, number: int | None) -> WriteError:
    error = WriteError(f"{target} could not be written; what was there before is as it was: {cause}")
    error.errno = number
    return error
