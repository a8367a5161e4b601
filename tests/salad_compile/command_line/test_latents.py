"""`salad-compile latents`: what it prints, as text and as JSON, and its exit codes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from salad_compile.command_line import latents as command
from salad_compile.errors import ConfigError
from salad_compile.latents import WAN_2_1, open_latents, opening, write_latents
from salad_compile.latents.layouts import LAYOUTS
from tests.salad_compile.latents.data import make_item, make_items, write_fastvideo
from tests.salad_compile.latents.test_opening import spoil


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(argument) for argument in arguments]))


def test_the_table_of_layouts_names_the_readers() -> None:
    assert {name: source.layout for name, source in opening.SOURCES.items()} == {name: name for name in LAYOUTS}


def test_inspect_as_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    items = [make_item(number, (16, 2, 8, 8) if number % 3 else (16, 1, 8, 8)) for number in range(5)]
    write_fastvideo(tmp_path, items)
    assert run("inspect", tmp_path) == 0
    said = capsys.readouterr().out
    assert "layout fastvideo, 5 items, 5 read" in said
    assert "  16x2x8x8: 3\n  16x1x8x8: 2\n" in said
    assert "stored latents: not normalised; read as (x - mean) / std" in said
    assert "normalisation: as expected\ndamaged items: none" in said
    assert run("inspect", tmp_path, "--normalized", "yes", "--sample", 2) == 0
    said = capsys.readouterr().out
    assert "5 items, 2 read" in said
    assert "normalisation: the latents look as if they were not normalised" in said


def test_inspect_as_json_with_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_latents(make_items(4), tmp_path)
    spoil(tmp_path, "clip1")
    (tmp_path / "items" / "clip2.safetensors").unlink()
    assert run("inspect", tmp_path, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["layout"], found["items"], found["items_read"]) == ("salad", 4, 3)
    assert found["shapes"] == {"16x2x4x6": 3}
    assert len(found["mean"]) == len(found["std"]) == 16
    assert found["problems"] == {
        "clip2": "items/clip2.safetensors is missing",
        "clip1": "the latent holds NaN or infinity",
    }
    assert run("inspect", tmp_path) == 1
    assert "damaged items: 2\n  clip2: items/clip2.safetensors is missing" in capsys.readouterr().out


def test_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_latents(make_items(4), tmp_path / "a")
    spoil(tmp_path / "a", "clip1")
    vae = tmp_path / "vae.json"
    vae.write_text(json.dumps({"latents_mean": [1.0] * 16, "latents_std": [2.0] * 16, "z_dim": 16}))
    assert run("convert", tmp_path / "a", tmp_path / "b", "--to", "fastvideo", "--skip", "--statistics", vae) == 0
    said = capsys.readouterr().out
    assert "3 items written, 1 left out\n  clip1: the latent holds NaN or infinity\n" in said
    assert run("convert", tmp_path / "b", tmp_path / "c", "--statistics", vae, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {"path": str(tmp_path / "c"), "written": 3, "kept": 0, "skipped": {}}
    # mean 1 and std 2: only the addition rounds
    read = open_latents(tmp_path / "c", sample=0)[0].latent
    assert (read - make_item(0).latent).abs().max() <= 2.0**-22
    assert run("convert", tmp_path / "b", tmp_path / "c", "--statistics", vae) == 0
    assert "0 items written, 3 were there from an earlier run, 0 left out" in capsys.readouterr().out


def test_statistics(tmp_path: Path) -> None:
    assert command._statistics("wan2.1") == WAN_2_1
    file = tmp_path / "statistics.json"
    file.write_text(json.dumps({"mean": [0], "std": [2]}))
    assert command._statistics(str(file)).std == (2.0,)
    for wrong in ("{}", "[]", "1", '{"mean": [0], "std": [0]}', "not JSON"):
        file.write_text(wrong)
        with pytest.raises(ConfigError, match=r"--statistics .*statistics.json: .*wan2.1 or hunyuanvideo, a directory"):
            command._statistics(str(file))
    with pytest.raises(ConfigError, match="No such file"):
        command._statistics(str(tmp_path / "nothing.json"))
