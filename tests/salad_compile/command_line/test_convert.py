from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

import salad_compile
from salad_compile.command_line import NO, WRONG
from salad_compile.command_line.model_source import load_model
from tests.models.zoo import CASES
from tests.salad_compile.command_line.conftest import SETTINGS, SIZE, Run


def test_the_file_is_that_of_a_conversion_with_weights(command: Run, wan: Path, tmp_path: Path) -> None:
    """Converting without memory leaves what converting with weights does, in the dtype of the stored weights."""
    file = tmp_path / "salad.safetensors"
    assert command("convert", wan, *SIZE, *SETTINGS, "--output", file).code == 0
    config = {"min_tokens": 90, "query_block": 32, "key_block": 16, "lora_rank": 3}
    inputs = {name: value.bfloat16() for name, value in CASES["Wan"].inputs(0).items() if name != "timestep"}
    inputs["timestep"] = CASES["Wan"].inputs(0)["timestep"]
    expected = salad_compile.convert(load_model(wan), config, example_inputs=inputs)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for module in expected.modules():
            if hasattr(module, "low_rank_scale"):
                module.reset_parameters()  # type: ignore[operator]
    salad_compile.save(expected, tmp_path / "expected.safetensors")
    ours, theirs = load_file(file), load_file(tmp_path / "expected.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor)
    assert ours["blocks.0.attn1.salad.low_rank_query_down"].abs().min() > 0
    loaded = salad_compile.load(load_model(wan), file)  # the header fits the base, too
    assert len(salad_compile.summary(loaded).sites) == 2


def test_json_and_a_directory(command: Run, wan: Path, tmp_path: Path) -> None:
    words = ("convert", wan, *SIZE, *SETTINGS, "--output", f"{tmp_path}/run/", "--sites", "blocks.1.*", "--json")
    made = command(*words).json()
    assert made["file"] == str(tmp_path / "run" / "salad.safetensors")
    assert Path(made["file"]).exists()
    assert [site["name"] for site in made["sites"]] == ["blocks.1.attn1"]


def test_a_file_that_is_there_stays(command: Run, wan: Path, tmp_path: Path) -> None:
    file = tmp_path / "salad.safetensors"
    file.write_text("trained for a week")
    words = ("convert", wan, *SIZE, *SETTINGS, "--output", tmp_path)
    outcome = command(*words)
    assert outcome.code == WRONG
    assert "--overwrite" in outcome.err
    assert file.read_text() == "trained for a week"
    assert command(*words, "--overwrite").code == 0
    assert salad_compile.load(load_model(wan), file)


def test_nothing_eligible_is_a_no(command: Run, wan: Path, tmp_path: Path) -> None:
    outcome = command("convert", wan, *SIZE, "--output", tmp_path)
    assert outcome.code == NO
    assert "can be converted" in outcome.err
    assert list(tmp_path.iterdir()) == []
