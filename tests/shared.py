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
VECTORS = "TORCHINDUCTOR_VEC_ISA_OK"
COLLECT = "TORCH_DYNAMO_RUN_GC_AFTER_COMPILE"

T = TypeVar("T")


def open_session() -> None:
    """Make the folder, and a new Inductor cache in it: what tests compile is compiled by this code, but once.

    Inductor takes the vector instructions that the processor names: a new cache would begin with ten CPU seconds in
    which it compiles a program for each kind. Dynamo looks for garbage after every compilation; here Python does it,
    now and then.
    """
    os.environ[FOLDER] = tempfile.mkdtemp(prefix="salad-tests-")
    os.environ[INDUCTOR] = str(Path(os.environ[FOLDER]) / "inductor")
    os.environ.setdefault(VECTORS, "1")
    os.environ.setdefault(COLLECT, "0")


def close_session() -> None:
    shutil.rmtree(os.environ.pop(FOLDER), ignore_errors=True)
    os.environ.pop(INDUCTOR, None)


def once(name: str, make: Callable[[], T]) -> T:
    """What `make` returned, in this process or in another one of the session; it is called only if neither has it."""
    if name not in _known:
        file = _file(name)
        if file is not None and file.is_file():
            _known[name] = pickle.loads(file.read_bytes())
        else:
            keep(name, make())
    made: T = _known[name]  # type: ignore[assignment]
    return made


def keep(name: str, made: object) -> None:
    """Let :func:`once` find it from now on, in every process of the session."""
    _known[name] = made
    file = _file(name)
    if file is not None:
        mine = file.with_suffix(f".{os.getpid()}")
        mine.write_bytes(pickle.dumps(made))
        mine.replace(file)  # whole for whoever looks


_known: dict[str, object] = {}


def _file(name: str) -> Path | None:
    """None in a process that knows of no session."""
    return Path(os.environ[FOLDER]) / f"{name}.pickle" if FOLDER in os.environ else None
