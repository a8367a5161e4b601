"""The registry of export formats: one new file adds one, and the documentation lists all."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

import salad_compile
from salad_compile.command_line import WRONG
from salad_compile.errors import ConfigError, ExportError
from salad_compile.exchange.export_format import ExportFormat
from salad_compile.exchange.formats import FORMATS, register_format
from tests.models.registry import ALL_CASES
from tests.salad_compile.command_line.conftest import Run, command, salad_file, wan
from tests.support import converted

__all__ = ["command", "salad_file", "wan"]  # fixtures

ROOT = Path(__file__).parents[3]
TOY = "tests.salad_compile.exchange.toy_format"


@pytest.fixture
def toy() -> Iterator[type[ExportFormat]]:
    """The format of toy_format.py, known for the length of a test."""
    before = dict(FORMATS)
    module = importlib.import_module(TOY)
    yield module.Shapes
    FORMATS.clear()
    FORMATS.update(before)
    del sys.modules[TOY]


def test_a_new_format_is_one_file(toy: type[ExportFormat], tmp_path: Path) -> None:
    model = converted(ALL_CASES["handwritten_fused"])
    report = salad_compile.export(model, tmp_path / "out", ["shapes", "salad"], base_model="somebody/base")
    assert [(entry.format, entry.path) for entry in report.formats] == [
        ("salad", "salad.safetensors"),
        ("shapes", "shapes/branches.json"),
    ]
    found = json.loads((tmp_path / "out" / "shapes" / "branches.json").read_text())
    saved = load_file(tmp_path / "out" / "salad.safetensors")
    assert found == {"base": "somebody/base", "shapes": {name: list(value.shape) for name, value in saved.items()}}
    assert report.formats[1].tensors == len(saved)
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'json.load(open("./shapes/branches.json"))' in card
    assert "- `shapes/branches.json`: shapes" in card
    # what the format wrote belongs to the export, which may be replaced
    assert "shapes" in [entry.format for entry in salad_compile.export(model, tmp_path / "out").written]
    salad_compile.export(model, tmp_path / "out", "salad")
    assert not (tmp_path / "out" / "shapes").exists()


def test_a_model_that_a_new_format_cannot_hold(toy: type[ExportFormat], tmp_path: Path) -> None:
    model = converted(ALL_CASES["handwritten_rearrange"])
    with pytest.raises(ExportError, match=r"shapes: a RearrangeDiT has no blocks\."):
        salad_compile.export(model, tmp_path / "out", "shapes")
    report = salad_compile.export(model, tmp_path / "out")
    assert {entry.format: entry.reason for entry in report.formats}["shapes"] == "a RearrangeDiT has no blocks."


def test_a_new_format_on_the_command_line(
    toy: type[ExportFormat], command: Run, wan: Path, salad_file: Path, tmp_path: Path
) -> None:
    words = ("export", "--model", wan, "--salad", salad_file, "--output", tmp_path / "out", "--json", "--formats")
    report = command(*words, "shapes").json()
    assert [entry["path"] for entry in report["formats"]] == ["shapes/branches.json"]
    assert (tmp_path / "out" / "shapes" / "branches.json").is_file()
    assert "merged, shapes;" in " ".join(command("export", "--help").out.split())
    outcome = command(*words, "shape")
    assert outcome.code == WRONG
    assert "unknown format 'shape'" in outcome.err
    assert "Did you mean 'shapes'?" in outcome.err


@pytest.mark.parametrize(("name", "place"), [("salad", "elsewhere"), ("other", "salad.safetensors")])
def test_two_formats_share_neither_name_nor_place(name: str, place: str) -> None:
    before = dict(FORMATS)
    cls = type("Other", (type(FORMATS["salad"]),), {"name": name, "place": place})
    with pytest.raises(ConfigError, match=r"collides with 'salad' at 'salad\.safetensors'"):
        register_format(cls)
    assert before == FORMATS


def test_the_documentation_lists_every_format() -> None:
    """The table of docs/formats.md, and the places in the tree above it."""
    section = (ROOT / "docs" / "formats.md").read_text().partition("## An export")[2].partition("\n## ")[0]
    rows = [line for line in section.partition("| format | where |")[2].partition("\n\n")[0].splitlines()[2:] if line]
    assert rows == [f"| {known.name} | `{known.place}` | {known.summary} |" for known in FORMATS.values()]
    assert all(f"\n  {known.place}" in section for known in FORMATS.values())
