"""A run that earlier code began, when conversions compensated nothing by default and files did not name the setting."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import salad_compile
from salad_compile.config import SaladConfig
from salad_compile.errors import ResumeError
from salad_compile.sites.branch import branches
from salad_compile.training import train
from tests.salad_compile.training.tiny import CONFIG, SETTINGS, base, latents

GIVEN = {name: value for name, value in CONFIG.to_dict().items() if not name.startswith("compensation")}
TWO = dataclasses.replace(SETTINGS, steps=2)
THREE = dataclasses.replace(SETTINGS, steps=3)


def resume(directory: Path, data: Path, settings: Any = THREE, **given: Any) -> Any:
    model = given.pop("model", None) or base(num_layers=1)
    train(model, latents(data), settings, directory, **given)
    return model


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """Two steps of a run; its checkpoint as code of before compensation wrote it."""
    directory = tmp_path / "run"
    resume(directory, tmp_path / "data", TWO, config={**GIVEN, "compensation": "none"})
    state = directory / "checkpoints" / "step-00000002" / "state.json"
    content = json.loads(state.read_text())
    for name in ("compensation", "compensation_pool"):
        del content["fingerprint"]["config"][name]
    del content["digest"], content["digests"]
    state.write_text(json.dumps(content))
    return directory


def test_the_same_settings_resume_it_as_it_was(begun: Path, tmp_path: Path) -> None:
    model = resume(begun, tmp_path / "data", config=GIVEN)
    assert next(iter(branches(model).values())).config.compensation == "none"
    resume(tmp_path / "whole", tmp_path / "data", config={**GIVEN, "compensation": "none"})
    ours, theirs = (load_file(folder / "salad.safetensors") for folder in (begun, tmp_path / "whole"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_what_is_given_as_another_is_refused_with_the_mend(begun: Path, tmp_path: Path) -> None:
    for other in ({**GIVEN, "compensation": "tail"}, SaladConfig(**GIVEN)):
        with pytest.raises(ResumeError, match=r"compensation \(was 'none', is 'tail'\).*--salad") as told:
            resume(begun, tmp_path / "data", config=other)
    checkpoint = begun / "checkpoints" / "step-00000002"
    assert str(checkpoint) in str(told.value)
    resume(begun, tmp_path / "data", model=salad_compile.load(base(num_layers=1), checkpoint))
    assert json.loads((begun / "training.json").read_text())["steps"] == 3


def test_a_size_of_pools_that_means_nothing_is_no_difference(begun: Path, tmp_path: Path) -> None:
    """Its default was 64 once; without compensation there are no pools."""
    none = {**GIVEN, "compensation": "none"}
    resume(begun, tmp_path / "data", config=SaladConfig(**none, compensation_pool=128))
    model = salad_compile.load(base(num_layers=1), begun)
    salad_compile.convert(model, {**none, "compensation_pool": 32})
    salad_compile.load(model, begun)
    assert SaladConfig(compensation_pool=128).different(SaladConfig()) == ["compensation_pool"]
