from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import salad_compile
from salad_compile.command_line import WRONG
from salad_compile.command_line.model_source import load_model
from tests.salad_compile.command_line.conftest import Run

SUMMARY = {"steps": 4711, "loss": 0.5, "validation_loss": None, "items": 9, "processes": 1, "settings": {}}


def test_formats_and_the_training_beside_the_file(command: Run, wan: Path, salad_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(salad_file, run)
    (run / "training.json").write_text(json.dumps(SUMMARY))
    words = ("export", "--model", wan, "--salad", run, "--output", tmp_path / "out", "--json")
    report = command(*words, "--formats", "salad", "merged", "--base-model", "somebody/wan").json()
    assert [entry["format"] for entry in report["formats"] if entry["path"]] == ["salad", "merged"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "somebody/wan" in card
    assert "4711" in card
    merged = load_model(tmp_path / "out" / "transformer")
    changed = merged.get_parameter("blocks.0.attn1.to_q.weight") - load_model(wan).get_parameter(
        "blocks.0.attn1.to_q.weight"
    )
    assert changed.abs().max() > 1e-2


def test_where_nothing_can_be_written_is_told_before_the_model_is_loaded(
    command: Run, wan: Path, tmp_path: Path
) -> None:
    outcome = command("export", "--model", tmp_path / "nowhere", "--salad", tmp_path / "nowhere", "--output", wan)
    assert outcome.code == WRONG
    assert f"{wan} holds config.json, diffusion_pytorch_model.safetensors, which no export wrote" in outcome.err


def test_both_experts(command: Run, pipeline: Path, wan: Path, salad_file: Path, tmp_path: Path) -> None:
    whole = tmp_path / "pipeline"
    shutil.copytree(pipeline, whole)
    shutil.copy(wan / "diffusion_pytorch_model.safetensors", whole / "transformer_2")
    words = ("--model", whole, "--salad", salad_file, "--salad-2", salad_file, "--output", tmp_path / "out")
    assert command("export", *words, "--formats", "salad").code == 0
    expected = load_file(salad_file)
    for name in ("transformer", "transformer_2"):
        exported = load_file(tmp_path / "out" / name / "salad.safetensors")
        assert exported.keys() == expected.keys()
        assert all(torch.equal(exported[key], tensor.to(exported[key].dtype)) for key, tensor in expected.items())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--formats", "difusers"), "unknown format 'difusers'"),
        (("--training", "nowhere.json"), "nowhere.json"),
        (("--component", "transformer_3"), ""),
        (("--max-shard-size", "5"), "max_shard_size is a size as in \"5GB\" (KB, MB, GB, TB), or bytes, got '5'"),
        (("--max-shard-size", "0GB"), "got '0GB'"),
    ],
)
def test_wrong_arguments(
    command: Run, pipeline: Path, salad_file: Path, tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    outcome = command("export", "--model", pipeline, "--salad", salad_file, "--output", tmp_path / "out", *words)
    assert outcome.code == WRONG
    assert said in outcome.err
    assert not (tmp_path / "out").exists()


def test_pushing(command: Run, wan: Path, salad_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed = []

    def push(directory: str, repo_id: str, *, private: bool | None) -> str:
        pushed.append((Path(directory), repo_id, private))
        return "https://hub/commit"

    monkeypatch.setattr(salad_compile, "push_to_hub", push, raising=False)
    words = ("--model", wan, "--salad", salad_file, "--output", tmp_path / "out", "--formats", "salad")
    report = command("export", *words, "--push-to-hub", "me/mine", "--private", "--json").json()
    assert report["commit"] == "https://hub/commit"
    assert pushed == [(tmp_path / "out", "me/mine", True)]
