"""Packages with lazy names: what completion shows, and what type checkers see."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import salad_compile
from salad_compile import errors

PACKAGES = ("salad_compile", *(f"salad_compile.{name}" for name in ("backend", "exchange", "latents", "training")))


@pytest.mark.parametrize("name", PACKAGES)
def test_completion_shows_public_names_only(name: str) -> None:
    package = importlib.import_module(name)
    names = set(dir(package))
    assert not [each for each in names if each.startswith("_") and each != "__version__"]
    assert names >= set(package.__all__)
    for each in names:
        assert getattr(package, each) is not None
    with pytest.raises(AttributeError, match="has no attribute 'convertt'"):
        package.convertt  # noqa: B018


def test_a_traceback_proposes_the_nearest_name() -> None:
    """By the interpreter, from what the error says about itself; Python 3.11 does so at the end of a process alone."""
    code = "import salad_compile; salad_compile.convertt"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "Did you mean: 'convert'?" in done.stderr


def test_public_modules_load_on_first_use() -> None:
    modules = {"errors", "kernels", "latents", "training"}
    assert set(dir(salad_compile)) - set(salad_compile.__all__) == {*modules, "__version__"}
    assert salad_compile.training.TrainSettings.__module__ == "salad_compile.training.settings"
    assert salad_compile.ConfigError is errors.ConfigError


@pytest.mark.parametrize("name", PACKAGES)
def test_type_checkers_see_every_name_and_no_getattr(name: str) -> None:
    package = importlib.import_module(name)
    body = ast.parse(Path(inspect.getfile(package)).read_text(encoding="utf-8")).body
    (shown,) = (node.body for node in body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {alias.asname for node in shown if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert set(dir(package)) - {"__version__"} <= seen
    assert not [node for node in body if isinstance(node, ast.FunctionDef) and node.name == "__getattr__"]
    assert not [node for node in body if isinstance(node, ast.Assign) and "__getattr__" in ast.unparse(node)]
