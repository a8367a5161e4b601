"""bench --video-steps: from models with one and four blocks to the whole model, against the whole model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from salad_compile.command_line import WRONG, bench, build_parser, timing
from salad_compile.command_line.timing import Timings
from salad_compile.command_line.training_cost import measure_sample
from tests.models.registry import ALL_CASES
from tests.salad_compile.command_line.conftest import SETTINGS, SIZE, Run

QUICK = ("--compile", "none", "--rounds", "1", "--device", "cpu", "--dtype", "float32", "--random")


def count_flops(calls: Mapping[str, Callable[[], object]], first: Any, device: torch.device, **how: Any) -> Any:
    """In place of a clock, which other programs on the machine disturb."""
    found = {}
    for name, call in calls.items():
        with FlopCounterMode(display=False) as counter:
            call()
        found[name] = Timings(name, 1.0, [float(counter.get_total_flops())], 1000)
    return found


def config_of(name: str, folder: Path, **blocks: int) -> Path:
    model = ALL_CASES[name].build()
    config = {**json.loads(model.to_json_string()), **blocks}  # type: ignore[operator]
    file = folder / f"{name}.json"
    file.write_text(json.dumps({**config, "_class_name": type(model).__name__}))
    return file


@pytest.mark.parametrize(("name", "blocks"), [("Wan", {"num_layers": 6}), ("CogVideoX", {"num_layers": 3})])
def test_it_is_the_time_of_the_whole_model(
    name: str, blocks: dict[str, int], command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "time_in_turns", count_flops)
    file = config_of(name, tmp_path, **blocks)
    words = ("bench", file, *SIZE, *SETTINGS, *QUICK, "--json")
    whole = command(*words).json()
    found = command(*words, "--video-steps", 50, "--guidance").json()
    for side in ("dense", "SALAD"):
        assert found["forward_ms"][side] == pytest.approx(whole[side]["median_ms"], rel=0.03)
        assert found["seconds"][side] == pytest.approx(100 * found["forward_ms"][side] / 1e3)
    assert found["blocks"] == blocks
    training = found["training"]
    arguments = build_parser("bench").parse_args([str(word) for word in words])
    measured = measure_sample(arguments, bench._make_pair, bench._compile)
    assert training["sample_ms"] == pytest.approx(measured.milliseconds, rel=0.03)
    assert training["trained_parameters"] == measured.trained
    assert training["sample_ms"] > 2 * found["forward_ms"]["SALAD"]
    assert training["hours"] == pytest.approx(12_800 * training["sample_ms"] / 3.6e6)
    held = 12 * measured.trained + 1000
    assert training["memory_bytes"] == found["weight_bytes"] + held
    assert found["weight_bytes"] == 4 * sum(
        p.numel() for p in type(ALL_CASES[name].build()).from_config(json.loads(file.read_text())).parameters()
    )


def test_the_table_and_what_cannot_be_scaled(command: Run, tmp_path: Path, wan: Path, salad_file: Path) -> None:
    file = config_of("Wan", tmp_path, num_layers=3)
    outcome = command("bench", file, *SIZE, *SETTINGS, *QUICK, "--video-steps", 4)
    assert outcome.code == 0
    said = outcome.out.replace("\n", " ")
    assert "4 forwards; measured on models with one and four blocks, scaled to num_layers 3" in outcome.out
    assert re.search(r"fine-tuning: \S+ s a sample, \S+ h for 1,600 steps of 8 samples, one by one; on your own", said)
    without = command("bench", file, *SIZE, *SETTINGS, *QUICK, "--video-steps", 4, "--no-training")
    assert "fine-tuning:" not in without.out
    for words, said in (
        (("--video-steps", 4, "--salad", salad_file), "leave --salad out"),
        (("--video-steps", 4, "--set", "dense_layers=1"), "takes all blocks for alike"),
        (("--guidance",), "give --video-steps, too"),
    ):
        outcome = command("bench", file, *SIZE, *QUICK, *words)
        assert outcome.code == WRONG
        assert said in outcome.err
    outcome = command("bench", wan / "config.json", *SIZE, *QUICK, "--video-steps", 4)
    assert "says of no kind of block how many there are" in outcome.err


def test_short_forwards_are_timed_several_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = {"fast": 30.0, "slow": 100.0}
    monkeypatch.setattr(timing, "_milliseconds", lambda call, device, steps: taken[call()])
    calls = [lambda name=name: name for name in taken]
    cpu = torch.device("cpu")
    assert timing.forwards_of(calls, cpu, 1, 200.0) == 7
    assert timing.forwards_of(calls, cpu, 9, 200.0) == 9
    assert timing.forwards_of(calls, cpu, 1, 1e6) == timing.MOST_FORWARDS
    assert timing.forwards_of(calls, cpu, 1, 0.0) == 1
