"""Compilation and gradient checkpointing of a run: as asked for, with the same results."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from salad_compile.errors import ConfigError, MissingPackageError
from salad_compile.training import read_log, train
from salad_compile.training.engine import Engine
from salad_compile.training.records import require_trackers
from tests.models.handwritten import FusedDiT
from tests.salad_compile.training.tiny import SETTINGS, converted, latents
from tests.support import relative_error


def test_compiled_and_checkpointed_runs_end_where_plain_ones_end(tmp_path: Path) -> None:
    data = latents(tmp_path / "latents")
    plain = dataclasses.replace(SETTINGS, steps=3)
    fast = dataclasses.replace(
        plain, gradient_checkpointing=True, compile="blocks", compile_options={"lowering": "aot_eager"}
    )
    torch._dynamo.reset()
    models: dict[str, Any] = {}
    for name, settings in (("plain", plain), ("fast", fast)):
        models[name] = converted()
        train(models[name], data, settings, tmp_path / name)
    assert models["fast"].is_gradient_checkpointing
    assert models["fast"].blocks[0]._compiled_call_impl is not None
    losses = ([line["loss"] for line in read_log(tmp_path / name) if "loss" in line] for name in ("fast", "plain"))
    for ours, theirs in zip(*losses, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)  # fp32, and three steps of AdamW
    ours, theirs = (load_file(tmp_path / name / "salad.safetensors") for name in ("fast", "plain"))
    assert all(relative_error(ours[key], theirs[key]) < 1e-3 for key in theirs)


def test_a_model_without_the_methods_trains_and_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = FusedDiT()
    settings = dataclasses.replace(SETTINGS, gradient_checkpointing=True, compile="blocks")
    with caplog.at_level(logging.WARNING, "salad_compile"):
        engine = Engine(None, settings, model, model, None)
        engine.compile()
        for _ in range(2):  # said once
            engine.checkpoint_activations()
    assert caplog.text.count("no enable_gradient_checkpointing()") == 1
    assert "no compile_repeated_blocks()" in caplog.text
    assert model._compiled_call_impl is None


def test_a_batch_that_cannot_be_divided(tmp_path: Path) -> None:
    from salad_compile.training.feeding import Feed

    data = latents(tmp_path / "latents")
    with pytest.raises(ConfigError, match=r"batch \(4\) must be a multiple of micro_batch x processes \(2 x 3\)"):
        Feed(data, SETTINGS, 0, 3)


def test_places_cover_the_batch_once_for_any_number_of_processes(tmp_path: Path) -> None:
    from salad_compile.training.feeding import Feed

    settings = dataclasses.replace(SETTINGS, batch=8, micro_batch=1)
    data = latents(tmp_path / "latents")
    read: dict[int, set[tuple[int, str]]] = {}
    for world in (1, 2, 4):
        read[world] = set()
        for rank in range(world):
            feed = Feed(data, settings, rank, world)
            loader = feed.micro_batches(3)
            for _ in range(feed.accumulation):
                read[world] |= {(place, item.name) for place, item in next(loader)}
        assert sorted(place for place, _ in read[world]) == list(range(8))
    assert read[1] == read[2] == read[4]


def test_a_launcher_that_accelerate_does_not_know_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import PartialState

    PartialState(
        cpu=True
    )  # of this process, alone; made behind the next line, it would look for the other one and stay half made
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="started 2 processes, and accelerate knows of 1"):
        train(converted(), latents(tmp_path / "latents"), SETTINGS, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_missing_package_of_a_tracker_is_named() -> None:
    require_trackers(("json",))
    with pytest.raises(MissingPackageError, match=r"salad-compile\[train\].* trackio_missing"):
        require_trackers(("trackio_missing",))
