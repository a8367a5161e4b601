"""Real videos: the file of films, the parts that are held out, pre-training by time, and rows of every kind of arm."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import salad_compile

Load = Callable[[str], ModuleType]
CPU = torch.device("cpu")


def film(frames: int, seed: int, width: int = 48) -> list[Image.Image]:
    """A picture that moves by a pixel a frame; its brightness says which film it is."""
    cells = np.random.default_rng(seed).integers(0, 60, (10, 20, 3), dtype=np.uint8) + np.uint8(60 * seed)
    picture = np.kron(cells, np.ones((4, 4, 1), dtype=np.uint8))
    return [Image.fromarray(np.roll(picture, number, 1)[:, :width]) for number in range(frames)]


@pytest.fixture(scope="module")
def packed(load: Load, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("films") / "films.npz"
    load("real_videos").pack({"a": film(60, 0), "b": film(50, 1), "c": film(20, 3)}, ["c"], path)
    return path


def ticking(step: float) -> Callable[[], float]:
    """A clock that goes on by `step` seconds whenever it is read."""
    ticks: Iterator[int] = itertools.count()
    return lambda: step * next(ticks)


def test_clips_are_functions_of_their_index_and_parts_share_no_frame(load: Load, packed: Path) -> None:
    films, size = load("real_videos").Films(packed, CPU), load("real_presets").TINY_REAL.sizes.model.clip
    first = films.batch("train", 7, 3, 4, size)
    assert first.shape == (4, 3, size.frames, size.edge, size.edge)
    assert float(first.abs().max()) <= 1
    assert torch.equal(first, load("real_videos").Films(packed, CPU).batch("train", 7, 3, 4, size))
    assert not torch.equal(first[0], first[1])
    assert [len(piece) for piece in films.pieces("train")] == [40, 32]  # the last fifth less, and 8 frames before it
    assert [len(piece) for piece in films.pieces("later")] == [12, 10]
    assert [len(piece) for piece in films.pieces("other")] == [20]
    assert float(films.batch("other", 0, 0, 4, size).mean()) > 0.5  # the bright film alone
    with pytest.raises(load("real_videos").FilmsError, match="64 frames"):
        films.clip("train", 0, 0, load("videos").ClipSize(frames=64, edge=16))
    with pytest.raises(load("real_videos").FilmsError, match="prepare"):
        load("real_videos").Films(packed.with_name("absent"), CPU)


def test_pretraining_ends_with_its_time_and_goes_on_after_a_kill(load: Load, packed: Path, tmp_path: Path) -> None:
    real_train, preset = load("real_train"), load("real_presets").TINY_REAL
    films = load("real_videos").Films(packed, CPU)
    # the clock is read once for each step, and once before: 4 steps of each stage
    model = real_train.pretrain(films, preset, 8.0, tmp_path / "whole", CPU, compiled=False, clock=ticking(1.0))
    real_train.save_dense(model, tmp_path / "dense")
    again = real_train.load_dense(tmp_path / "dense", preset.sizes.model)
    assert all(torch.equal(p.half(), q.half()) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    done = real_train.pretrain(films, preset, 8.0, tmp_path / "whole", CPU, compiled=False, clock=ticking(1.0))
    assert torch.equal(done.proj_out.weight.half(), model.proj_out.weight.half())

    stage = preset.stages[1]
    kept = tmp_path / "stage.pt"
    half = real_train.TimedTraining(again, stage, 1, preset)
    half.step, half.used = 5, 0.5
    half.save(kept)
    resumed = real_train.TimedTraining(again, stage, 1, preset)
    resumed.load(kept)
    assert (resumed.step, resumed.used) == (5, 0.5)
    assert resumed.rate() == pytest.approx(stage.rate / 2)  # a cosine, half way
    real_train._train_stage(resumed, again, films, 4.0, kept, CPU, ticking(1.0))
    assert resumed.step == 7  # half of 4 s were left
    with pytest.raises(FileNotFoundError, match="pretrain"):
        real_train.load_dense(tmp_path / "absent", preset.sizes.model)


@pytest.fixture(scope="module")
def place(load: Load, packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder with a dense model whose output is not zero."""
    preset, folder = load("real_presets").TINY_REAL, tmp_path_factory.mktemp("real")
    torch.manual_seed(0)
    model = load("model").VideoDiT(preset.sizes.model)
    torch.nn.init.normal_(model.proj_out.weight, std=0.1)
    load("real_train").save_dense(model, folder / "dense")
    return load("real_arms").Place(
        CPU, preset, packed, folder / "dense", folder / "kept", folder / "rows.jsonl", compiled=False, workers=0
    )


def test_rows_of_every_kind_at_one_step(load: Load, place: Any) -> None:
    pytest.importorskip("accelerate")
    real, arms, films = load("real"), load("real_arms"), load("real_videos").Films(place.films, CPU)
    chosen = [arms.real_arm_named(name) for name in ("dense", "sparse-only", "salad-tail", "sparse-lora")]
    tail, lora = chosen[2:]
    # time for one chunk of two steps: the next one would end too late. The other arm comes to its end.
    model = arms.make(tail, place, 0)
    steps = arms.tune(
        model, films, place.preset, place.folder_of(tail, 0), 0, seconds=3.0, workers=0, clock=ticking(1.0)
    )
    assert steps == 2
    arms.tune_arm(lora, films, place, 0, seconds=600.0)
    assert sorted(arms.tunings(place.folder_of(lora, 0))) == [2, 4]
    assert arms.common_step(chosen, place, 0) == 2
    assert real.judge_arms(place, real.open_judge(place), chosen, 0) == 0
    rows = {row["arm"]: row for row in load("results").read(place.rows)}
    assert set(rows) == {arm.name for arm in chosen}
    for row in rows.values():
        json.dumps(row, allow_nan=False)
        assert row["held_out_loss"] > 0
    assert rows["salad-tail"]["settings"]["tune"]["steps"] == rows["sparse-lora"]["settings"]["tune"]["steps"] == 2
    assert rows["dense"]["difference_restored"] == 0.0
    assert len({row["held_out_loss"] for row in rows.values()}) == 4
    assert place.rows.with_name("clips.npz").exists()
    arms.tune_arm(tail, films, place, 0, seconds=600.0)  # goes on from step 2
    assert sorted(arms.tunings(place.folder_of(tail, 0))) == [2, 4]


def test_an_arm_that_was_not_tuned_is_said(load: Load, place: Any, capsys: pytest.CaptureFixture[str]) -> None:
    arms, elsewhere = load("real_arms"), dataclasses.replace(place, rows=place.rows.with_name("other.jsonl"))
    real = load("real")
    assert real.judge_arms(elsewhere, real.open_judge(place), [arms.real_arm_named("tail-lora")], 0) == 1
    assert "real.py tune tail-lora" in capsys.readouterr().out
    with pytest.raises(load("arms").UnknownArmError, match="salad-tail"):
        arms.real_arm_named("nobody")
    assert real.main(["--tiny", "--device", "cpu", "--films", "absent", "tune", "salad"]) == 2
    assert "real.py prepare" in capsys.readouterr().err


def test_the_full_model_has_16384_tokens_and_head_dim_128(load: Load) -> None:
    arms, sizes = load("real_arms"), load("real_presets").REAL.sizes
    model = load("model").VideoDiT(sizes.model).to("meta")
    assert 10e6 < sum(p.numel() for p in model.parameters()) < 30e6
    inputs = load("arms").example_inputs(sizes, torch.device("meta"))
    for arm in arms.REAL_ARMS:
        if arm.kind == "salad":
            config = load("arms").config_of(arm, sizes)
            assert config.sparsity == (0.0 if "dense" in arm.name else 0.9)
    text = salad_compile.plan(model, inputs, config=config).to_text()
    assert "16384" in text
    assert "3 x 128" in text
    assert "8 of 8" in text


def test_the_section_is_what_the_rows_say(load: Load, tmp_path: Path) -> None:
    evidence = load("evidence_real")
    assert evidence.render(evidence.newest_rows()) in evidence.PAGE.read_text()
    machine = {"device": "NVIDIA Imaginary", "torch": "2.11", "triton": "3.6", "commit": "abc", "date": "2026-11-30"}
    size = {"layers": 8, "heads": 3, "width": 384}

    def row(arm: str, loss: float, trained: bool = False) -> dict[str, Any]:
        tune = {"steps": 300 if trained else 0, "batch": 16, "rate": 0.002}
        settings = {"tune": tune, "rank": 16, "trained": trained, "model": size}
        losses = {"held_out_loss": loss, "loss_later": loss - 0.01, "loss_other": loss + 0.01}
        alike = {"psnr_restored": 30.0, "ssim_restored": 0.9, "difference_restored": 0.01, "training_seconds": 9.0}
        own = {"arm": arm, "seed": 0, "settings": settings, "parameters": 13e6, "tokens": 16_384}
        return {**own, **losses, **alike, "held_out_by_level": [loss] * 5, **machine}

    rows = [row("dense", 0.1), row("sparse-only", 0.2), row("tail-only", 0.15), row("salad", 0.11, trained=True)]
    page = tmp_path / "page.md"
    page.write_text(f"before\n{evidence.BEGIN}\nold\n{evidence.END}\nafter\n")
    evidence.write(page, rows)
    text = page.read_text()
    assert "old" not in text
    assert "| `tail-only` | and means of 256 tokens | 0.15000 | 1.500 | 50.0% | 50.0% | 50.0% | 30.0 |" in text
    assert "The most that a fine-tuned arm closes is 90.0% (`salad`): 85% is reached." in text
    assert "Not run: " in text
    assert evidence.NOTHING in evidence.render(rows[1:])
    page.write_text("nothing")
    with pytest.raises(ValueError, match="markers"):
        evidence.write(page, rows)
