"""TrainSettings: JSON both ways, and every wrong value is an error that names it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from salad_compile.errors import ConfigError
from salad_compile.training import TrainSettings
from salad_compile.training.settings import MAY_CHANGE

OTHER = {
    "steps": 7,
    "betas": (0.5, 0.6),
    "trackers": ("tensorboard",),
    "compile_options": {"strict": False},
    "timestep_sampling": "logit-normal",
    "ema_decay": 0.99,
}


def test_json_round_trip(tmp_path: Path) -> None:
    settings = TrainSettings(**OTHER)  # type: ignore[arg-type]
    file = tmp_path / "settings.json"
    file.write_text(json.dumps(settings.to_dict()))
    assert TrainSettings.from_file(file) == settings
    assert TrainSettings.from_dict({}) == TrainSettings()


def test_the_recipe_of_the_paper_is_the_default() -> None:
    settings = TrainSettings()
    assert (settings.steps, settings.batch) == (1600, 8)


def test_with_changes_checks_them() -> None:
    assert TrainSettings().with_changes({"batch": 16}) == TrainSettings(batch=16)
    with pytest.raises(ConfigError, match="Did you mean 'learning_rate'"):
        TrainSettings().with_changes({"learning_rat": 1.0})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"step": 3}, "Did you mean 'steps'"),
        ({"schema_version": 2}, "schema version 2"),
        ({"steps": 0}, "steps must be a whole number of at least 1"),
        ({"steps": 1.5}, "steps must be"),
        ({"batch": True}, "batch must be"),
        ({"batch": 8, "micro_batch": 3}, "multiple of micro_batch"),
        ({"learning_rate": "fast"}, "learning_rate must be"),
        ({"learning_rate": float("nan")}, "learning_rate must be"),
        ({"clip": -1.0}, "clip must be"),
        ({"flow_shift": 0.0}, "flow_shift must be"),
        ({"text_dropout": 1.1}, "text_dropout must be"),
        ({"ema_decay": 1.0}, "ema_decay must be"),
        ({"betas": [0.9]}, "betas must be"),
        ({"betas": [0.9, 1.0]}, "betas must be"),
        ({"timestep_sampling": "logitnormal"}, "Did you mean 'logit-normal'"),
        ({"precision": "fp16"}, "precision must be"),
        ({"compile": True}, "compile must be"),
        ({"on_non_finite": "ignore"}, "on_non_finite must be"),
        ({"gradient_checkpointing": 1}, "gradient_checkpointing must be"),
        ({"compile_options": ["a"]}, "compile_options must be"),
        ({"trackers": ["wandb"]}, "trackers must be"),
        ({"trackers": "tensorboard"}, "trackers must be"),
    ],
)
def test_wrong_settings(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        TrainSettings.from_dict(changes)


def test_a_file_of_an_editor_that_marks_utf_8(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text('{"steps": 3}', encoding="utf-8-sig")
    assert TrainSettings.from_file(tmp_path / "settings.json").steps == 3


@pytest.mark.parametrize(("text", "said"), [("{", "not a JSON file"), ("[1]", "holds a list")])
def test_wrong_files(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "settings.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=said):
        TrainSettings.from_file(file)


def test_every_attribute_is_documented_and_known() -> None:
    names = {field.name for field in dataclasses.fields(TrainSettings)}
    assert names >= MAY_CHANGE
    assert not [name for name in names if name not in (TrainSettings.__doc__ or "")]
