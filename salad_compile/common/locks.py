"""Holding a directory against other writers, of this process, of this machine and of other containers.

The lock is on the directory itself, so that there is no file of it: those of filelock stay for ever, because whoever
removes one takes it from a writer who waits for it. The system lets go of a lock when its process ends, in any way.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from salad_compile.errors import WriteError

if sys.platform != "win32":
    import fcntl

WAIT_SECONDS = 600.0  # for a writer that writes; who is killed lets go
_POLL_SECONDS = 0.005
_HELD = (errno.EAGAIN, errno.EACCES)
_open: set[int] = set()  # descriptors of this process


def _let_go() -> None:
    """In a forked process, which would hold on after the death of the one that locked."""
    for descriptor in _open:
        os.close(descriptor)
    _open.clear()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_let_go)


@contextlib.contextmanager
def hold(directory: Path, seconds: float = WAIT_SECONDS) -> Iterator[bool]:
    """While entered, others wait in :func:`hold` of the same directory, threads of this process too.

    Args:
        seconds: to wait for others.

    Yields:
        Whether it is held: some network file systems, and Windows, have no such locks.

    Raises:
        WriteError: another held it all the time. OSError: there is no such directory.
    """
    if sys.platform == "win32":
        yield False
        return
    end = time.monotonic() + seconds
    while True:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        _open.add(descriptor)
        try:
            held = _lock(descriptor, directory, end)
            if os.path.samestat(os.fstat(descriptor), os.stat(directory)):
                yield held
                return
        finally:
            if descriptor in _open:  # else this is a fork, which has let go
                _open.discard(descriptor)
                os.close(descriptor)  # and so the lock; another directory may have taken the name meanwhile


def is_held(directory: Path) -> bool:
    """Whether somebody holds it just now."""
    try:
        with hold(directory, seconds=0):
            return False
    except WriteError:
        return True


def _lock(descriptor: int, directory: Path, end: float) -> bool:
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno not in _HELD:
                return False
        if time.monotonic() > end:
            failure = WriteError(f"another process is writing in {directory}: wait for it, or name another directory.")
            failure.errno = errno.EAGAIN
            raise failure
        time.sleep(_POLL_SECONDS)
