"""Every arm builds, trains one step, and writes a row; what is not there is said."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import salad_compile

Load = Callable[[str], ModuleType]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def place(load: Load, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder with a dense model whose output is not zero."""
    run, folder = load("run"), tmp_path_factory.mktemp("experiment")
    preset = load("presets").TINY
    torch.manual_seed(0)
    model = load("model").VideoDiT(preset.model)
    torch.nn.init.normal_(model.proj_out.weight, std=0.1)
    base = folder / "dense.safetensors"
    run.save_dense(model, base)
    return run.Place(CPU, preset, base, folder / "tuned", folder / "kept", folder / "rows.jsonl", compiled=False)


# one of each kind, and what others start from
ROWS = [
    "dense",
    "dense-tuned",
    "sparse-only",
    "sparse-lora",
    "salad",
    "salad-stswa",
    "linear-only",
    "rope-16",
    "drop-20",
]


def rows_of(load: Load, place: Any) -> dict[str, Any]:
    return {row["arm"]: row for row in load("results").read(place.rows)}


def test_every_arm_writes_a_row_once(load: Load, place: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run, arms = load("run"), load("arms")
    for arm in arms.ARMS:
        if arm.kind == "salad":
            arms.config_of(arm, place.preset)  # raises for settings that do not exist
    assert run.run_all(ROWS, [0], place) == 0
    rows = rows_of(load, place)
    assert set(rows) == set(ROWS)
    for row in rows.values():
        assert row["held_out_loss"] > 0
        assert {"commit", "command", "torch", "device", "date", "psnr", "ssim", "seconds", "settings"} <= set(row)
        json.dumps(row)
    assert rows["dense-tuned"]["held_out_loss"] != rows["dense"]["held_out_loss"]
    assert rows["sparse-only"]["sparsity"] == 0.75  # one of four blocks of a tiny clip
    capsys.readouterr()
    assert run.run_all(ROWS, [0], place) == 0
    assert "held-out" not in capsys.readouterr().out


def test_an_arm_trains_what_it_says(load: Load, place: Any) -> None:
    run, arms, preset = load("run"), load("arms"), place.preset

    def trained(name: str) -> int:
        model = arms.build(arms.arm_named(name), run.load_dense(place.base, preset, CPU), preset, CPU, 0)
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    width, layers, rank = preset.model.width, preset.model.layers, preset.rank
    low_rank, projection, gate = layers * 8 * rank * width, layers * (width * width + width), layers * (width + 1)
    assert trained("dense-tuned") == trained("sparse-lora") == low_rank
    assert trained("linear-only") == low_rank + projection
    assert trained("salad") == trained("salad-stswa") == low_rank + projection + gate


@pytest.mark.parametrize("name", ["salad", "sparse-lora", "salad-stswa"])
def test_exactly_the_self_attention_is_converted(load: Load, place: Any, name: str) -> None:
    run, arms, preset = load("run"), load("arms"), place.preset
    model = arms.build(arms.arm_named(name), run.load_dense(place.base, preset, CPU), preset, CPU, 0)
    sites = [found for found, module in model.named_modules() if found.endswith(".salad")]
    assert sites == [f"blocks.{n}.attn.salad" for n in range(preset.model.layers)]


def test_the_full_model_has_one_grid_of_4096_tokens(load: Load) -> None:
    arms, preset = load("arms"), load("presets").FULL
    model = load("model").VideoDiT(preset.model).to("meta")
    inputs = arms.example_inputs(preset, torch.device("meta"))
    plan = salad_compile.plan(model, inputs, config=arms.config_of(arms.arm_named("salad"), preset))
    assert "6 of 6" in plan.to_text()
    assert "(1, 4, 4)" in plan.to_text()


def test_what_is_missing_is_said(load: Load, place: Any) -> None:
    run, arms = load("run"), load("arms")
    with pytest.raises(arms.UnknownArmError, match="sparse-lora"):
        arms.arm_named("sparse_lora")
    with pytest.raises(FileNotFoundError, match=r"run\.py dense"):
        run.load_dense(place.base.with_name("absent.safetensors"), place.preset, CPU)
    elsewhere = dataclasses.replace(place, tuned=Path("absent"))
    with pytest.raises(FileNotFoundError, match="arm salad"):
        run.run_arm(arms.arm_named("drop-all"), [0], elsewhere)


def test_wrong_command_lines(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    run = load("run")
    assert run.main(["--tiny", "--device", "cpu", "arm", "nobody"]) == 2
    assert "no arm 'nobody'" in capsys.readouterr().err
    assert run.main(["--tiny", "--device", "cpu", "--steps", "0", "dense"]) == 2
    assert "above 0" in capsys.readouterr().err
