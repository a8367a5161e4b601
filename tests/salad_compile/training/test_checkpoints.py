"""Checkpoints: what a run has written is never lost to a later one, and what cannot be read is never written."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from salad_compile.errors import ConfigError, ResumeError, TrainingError
from salad_compile.latents import LatentDataset, open_latents, write_latents
from salad_compile.training import records as records_module
from salad_compile.training import train
from tests.salad_compile.training.tiny import SETTINGS, converted, items, latents

RUN = dataclasses.replace(SETTINGS, steps=4, checkpoint_every=1, keep_last=4)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> LatentDataset:
    return latents(tmp_path_factory.mktemp("data") / "latents")


@pytest.fixture(scope="module")
def finished(data: LatentDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "finished"
    train(converted(), data, RUN, directory)
    return directory


@pytest.fixture
def directory(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def contents(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def damage(checkpoint: Path) -> None:
    file = checkpoint / "training.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def damage_all(directory: Path) -> None:
    for checkpoint in (directory / "checkpoints").iterdir():
        damage(checkpoint)


def delete_all(directory: Path) -> None:
    shutil.rmtree(directory / "checkpoints")


@pytest.mark.parametrize(
    ("loss", "said"),
    [(delete_all, "result of a finished run.*--salad"), (damage_all, "none of the checkpoints.*is complete.*--salad")],
)
def test_without_a_checkpoint_to_go_on_from_nothing_is_replaced(
    data: LatentDataset, directory: Path, loss: Callable[[Path], None], said: str
) -> None:
    loss(directory)
    before = contents(directory)
    with pytest.raises(ResumeError, match=said):
        train(converted(), data, RUN, directory)
    assert contents(directory) == before


def test_data_of_the_same_names_and_other_values_are_told(data: LatentDataset, directory: Path, tmp_path: Path) -> None:
    anew = (dataclasses.replace(item, text=item.text + 1) for item in items())
    write_latents(anew, tmp_path / "anew")
    more = dataclasses.replace(RUN, steps=5)
    with pytest.raises(ResumeError, match="data: latents or texts of the same names have other values"):
        train(converted(), open_latents(tmp_path / "anew"), more, directory)
    state = directory / "checkpoints" / "step-00000004" / "state.json"
    content = json.loads(state.read_text())
    del content["fingerprint"]["values"], content["digest"]  # as an earlier release wrote it
    state.write_text(json.dumps(content))
    assert train(converted(), data, more, directory).step == 5


def test_a_damaged_checkpoint_takes_no_place_of_a_complete_one(
    data: LatentDataset, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = directory / "checkpoints"
    shutil.rmtree(folder / "step-00000003")
    damage(folder / "step-00000004")
    log: list[int] = []

    def die(self: Any, values: dict[str, Any]) -> None:  # as if killed in the step after the checkpoint of step 3
        log.append(values["step"])
        if values["step"] == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(records_module.Records, "step", die)
    with pytest.raises(KeyboardInterrupt):
        train(converted(), data, dataclasses.replace(RUN, keep_last=1), directory)
    assert log == [3, 4]
    assert sorted(os.listdir(folder)) == ["step-00000003", "step-00000004"]
    monkeypatch.undo()
    assert train(converted(), data, RUN, directory).finished


def test_copies_under_other_names_and_links_stay_what_they_are(data: LatentDataset, directory: Path) -> None:
    folder = directory / "checkpoints"
    kept = folder / "step-00000002-good"
    shutil.copytree(folder / "step-00000002", kept)
    shutil.move(folder / "step-00000003", directory / "elsewhere")
    (folder / "step-00000003").symlink_to(directory / "elsewhere")
    before = contents(kept) | contents(directory / "elsewhere")
    train(converted(), data, dataclasses.replace(RUN, steps=6, keep_last=1), directory)
    assert sorted(os.listdir(folder)) == [kept.name, "step-00000006"]  # both came before the last one
    assert contents(kept) | contents(directory / "elsewhere") == before


def test_results_are_set_aside_under_their_own_step(data: LatentDataset, directory: Path) -> None:
    damage(directory / "checkpoints" / "step-00000004")
    train(converted(), data, dataclasses.replace(RUN, steps=5), directory)
    assert (directory / "salad-step-00000004.safetensors").exists()
    assert not (directory / "salad-step-00000003.safetensors").exists()


def test_a_conversion_that_cannot_be_read_here_is_told(data: LatentDataset, directory: Path) -> None:
    """As of a pattern that is registered elsewhere."""
    state = directory / "checkpoints" / "step-00000004" / "state.json"
    content = json.loads(state.read_text())
    content["fingerprint"]["config"]["pattern"] = "mine"
    del content["digest"]
    state.write_text(json.dumps(content))
    with pytest.raises(ResumeError, match=r"settings, which cannot be read here.*got 'mine'"):
        train(converted(), data, dataclasses.replace(RUN, steps=5), directory)


def test_a_kill_while_results_are_set_aside_loses_none(
    data: LatentDataset, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = (directory / "salad.safetensors").read_bytes()
    more = dataclasses.replace(RUN, steps=5)
    rename = Path.replace

    def once(self: Path, target: Path) -> Path:
        moved = rename(self, target)
        if self.parent == directory and "step-" in target.name:
            raise KeyboardInterrupt
        return moved

    monkeypatch.setattr(Path, "replace", once)
    with pytest.raises(KeyboardInterrupt):
        train(converted(), data, more, directory)
    monkeypatch.undo()
    train(converted(), data, more, directory)
    assert (directory / "salad-step-00000004.safetensors").read_bytes() == result
    assert (directory / "training-step-00000004.json").exists()


@pytest.mark.parametrize("place", ["parameters", "moments"])
def test_what_no_run_could_go_on_from_is_no_checkpoint(
    data: LatentDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    step = torch.optim.AdamW.step

    def overflow(self: torch.optim.AdamW, closure: Any = None) -> None:
        step(self, closure)
        first = self.param_groups[0]["params"][0]
        (first.data if place == "parameters" else self.state[first]["exp_avg_sq"]).fill_(torch.inf)

    monkeypatch.setattr(torch.optim.AdamW, "step", overflow)
    with pytest.raises(TrainingError, match=r"no checkpoint of step 1: .*NaN or infinity.*lower learning rate"):
        train(converted(), data, RUN, tmp_path)
    assert os.listdir(tmp_path / "checkpoints") == []


def test_a_base_with_values_that_are_not_finite_is_named(data: LatentDataset, tmp_path: Path) -> None:
    model = converted()
    with torch.no_grad():
        model.blocks[0].ffn.net[2].weight[0, 0] = float("nan")
    with pytest.raises(ConfigError, match=r"blocks\.0\.ffn\.net\.2\.weight holds NaN or infinity"):
        train(model, data, RUN, tmp_path / "run")
    assert not (tmp_path / "run").exists()
