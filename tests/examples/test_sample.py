"""The shipped weights load, are better together than untrained, and the strip is a picture."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors import safe_open

Load = Callable[[str], ModuleType]


def test_the_assets_beat_untrained_sparsity(load: Load) -> None:
    pytest.importorskip("matplotlib")
    flow, preset = load("flow"), load("presets").FULL
    triples = flow.held_out_triples(2, preset.model.clip, torch.device("cpu"))
    losses = [flow.held_out_loss(model, triples, 1)[0] for model in load("sample").models().values()]
    dense, untrained, salad = losses
    assert dense < salad < untrained
    assert salad - dense < 0.3 * (untrained - dense)


def test_the_shipped_branches_are_those_of_a_row(load: Load) -> None:
    """The arm that sample.py names, with the configuration and the dense model that its row says."""
    pytest.importorskip("matplotlib")
    sample = load("sample")
    arm = "tail-error-16-taught"
    assert f'"{arm}", seed 0' in " ".join(sample.__doc__.split())
    with safe_open(sample.ASSETS / "salad.safetensors", "pt") as file:
        config = json.loads(file.metadata()["salad_config"])["config"]
    rows = (json.loads(line) for line in (sample.RESULTS / "experiment_h200.jsonl").read_text().splitlines())
    (row,) = (row for row in rows if (row["arm"], row["seed"]) == (arm, 0))
    assert row["settings"]["config"] == config


def test_the_seconds_go_into_the_sentence_of_the_strip(load: Load) -> None:
    pytest.importorskip("matplotlib")
    sample = load("sample")
    for page in sample.PAGES:
        text = page.read_text(encoding="utf-8")
        other = sample.with_seconds(text, (19.04, 8.0, 7.96))
        assert "(19.0 s)" in other
        assert "(8.0 s)" in other
        assert "2601.16515, 8.0 s)" in " ".join(other.split())
        assert sample.with_seconds(other, (19.04, 8.0, 7.96)) == other
    with pytest.raises(ValueError, match="0 times"):
        sample.with_seconds("no strip", (1.0, 2.0, 3.0))


def test_the_strip_is_a_picture(load: Load, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    load("sample").draw_strip(
        {"one": torch.rand(1, 3, 4, 16, 16), "two": torch.rand(1, 3, 4, 16, 16)}, tmp_path / "x.png"
    )
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_assets_are_small() -> None:
    assets = Path(__file__).parents[2] / "examples" / "experiment" / "assets"
    assert sum(path.stat().st_size for path in assets.iterdir()) < 8e6
