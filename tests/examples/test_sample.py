"""The shipped weights load, are better together than untrained, and the strip is a picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

Load = Callable[[str], ModuleType]


def test_the_assets_beat_untrained_sparsity(load: Load) -> None:
    pytest.importorskip("matplotlib")
    flow, preset = load("flow"), load("presets").FULL
    triples = flow.held_out_triples(2, preset.model.clip, torch.device("cpu"))
    losses = [flow.held_out_loss(model, triples, 1)[0] for model in load("sample").models().values()]
    dense, untrained, salad = losses
    assert dense < salad < untrained
    assert salad - dense < 0.5 * (untrained - dense)


def test_the_strip_is_a_picture(load: Load, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    load("sample").draw_strip(
        {"one": torch.rand(1, 3, 4, 16, 16), "two": torch.rand(1, 3, 4, 16, 16)}, tmp_path / "x.png"
    )
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_assets_are_small() -> None:
    assets = Path(__file__).parents[2] / "examples" / "experiment" / "assets"
    assert sum(path.stat().st_size for path in assets.iterdir()) < 8e6
