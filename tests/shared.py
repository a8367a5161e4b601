"""What the processes of one test session share: a folder, and in it what is the same every time and takes long.

`tests/conftest.py` makes the folder before workers start; they and the processes that tests start inherit its name.
"""

from __future__ import annotations

import os
import pickle
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

FOLDER = "SALAD_TESTS_SHARED"
INDUCTOR = "TORCHINDUCTOR_CACHE_DIR"

T = TypeVar("T")


def open_session() -> None:
    """Make the folder, and a new Inductor cache in it: what tests compile is compiled by this code, but once."""
    os.environ[FOLDER] = tempfile.mkdtemp(prefix="salad-tests-")
    os.environ[INDUCTOR] = str(Path(os.environ[FOLDER]) / "inductor")


def close_session() -> None:
    shutil.rmtree(os.environ.pop(FOLDER), ignore_errors=True)
    os.environ.pop(INDUCTOR, None)


def once(name: str, make: Callable[[], T]) -> T:
    """What `make` returns: of this process, or of another one of the session that was here before."""
    if name not in _known:
        _known[name] = _from_disk(name, make) if FOLDER in os.environ else make()
    made: T = _known[name]  # type: ignore[assignment]
    return made


_known: dict[str, object] = {}


def _from_disk(name: str, make: Callable[[], T]) -> T:
    file = Path(os.environ[FOLDER]) / f"{name}.pickle"
    if file.is_file():
        known: T = pickle.loads(file.read_bytes())
        return known
    made = make()
    mine = file.with_suffix(f".{os.getpid()}")
    mine.write_bytes(pickle.dumps(made))
    mine.replace(file)  # whole for whoever looks
    return made
