"""The notebook as a newcomer runs it: every code cell in order, in one namespace."""

from __future__ import annotations

import ast
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")
NOTEBOOK = Path(__file__).parents[2] / "examples" / "first_video.ipynb"


def run_cell(source: str, namespace: dict[str, Any]) -> Any:
    """Run one cell; what a notebook would show below it: the value of its last line, if that is an expression."""
    lines = ast.parse(source)
    shown = None
    if isinstance(lines.body[-1], ast.Expr):
        shown = ast.Expression(lines.body.pop().value)
    exec(compile(lines, str(NOTEBOOK), "exec"), namespace)
    return shown and eval(compile(shown, str(NOTEBOOK), "eval"), namespace)


def test_every_cell_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    torch.compiler.reset()
    code = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in code), "strip the outputs"
    namespace: dict[str, Any] = {"__name__": "__main__"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shown = [run_cell("".join(cell["source"]), namespace) for cell in code]
    tables = [value._repr_markdown_() for value in shown if hasattr(value, "_repr_markdown_")]
    titles = [table.split("**")[1] for table in tables]
    assert titles[1:] == ["converted sites", "graphs", "converted sites"]
    assert "not measured" in tables[1]
    assert "not measured" not in tables[3]
    assert namespace["losses"] == sorted(namespace["losses"], reverse=True)
    assert "salad.safetensors" in shown[5]
    assert shown[-1]._repr_png_().startswith(b"\x89PNG")
    assert "largest difference of the outputs: 0.0" in capsys.readouterr().out
