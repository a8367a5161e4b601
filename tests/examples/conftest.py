"""The experiment is a folder of scripts that import each other by name: put it on the path while its tests run."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

EXPERIMENT = Path(__file__).parents[2] / "examples" / "experiment"
NAMES = [path.stem for path in EXPERIMENT.glob("*.py")]


@pytest.fixture(scope="package")
def load() -> Iterator[Callable[[str], ModuleType]]:
    """Import a module of the experiment; its plain names are forgotten afterwards."""
    sys.path.insert(0, str(EXPERIMENT))
    yield importlib.import_module
    sys.path.remove(str(EXPERIMENT))
    for name in NAMES:
        sys.modules.pop(name, None)
