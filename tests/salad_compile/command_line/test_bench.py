from __future__ import annotations

from pathlib import Path

import pytest
import torch

from salad_compile.command_line import WRONG
from salad_compile.command_line.timing import Timings, first_call, time_in_turns
from tests.salad_compile.command_line.conftest import SETTINGS, SIZE, Run

QUICK = ("--compile", "none", "--rounds", "2", "--device", "cpu", "--dtype", "float32")


def test_a_fresh_conversion(command: Run, wan: Path) -> None:
    report = command("bench", wan / "config.json", *SIZE, *SETTINGS, *QUICK, "--random", "--steps", 2, "--json").json()
    for name in ("dense", "SALAD"):
        assert len(report[name]["timings_ms"]) == 2
        assert 0 < report[name]["p10_ms"] <= report[name]["median_ms"] <= report[name]["p90_ms"]
        assert report[name]["peak_bytes"] is None
    assert (report["sites"], report["tokens"], report["dtype"], report["lora"]) == (2, 154, "float32", "merged")
    assert (report["steps"], report["rounds"], report["compile"]) == (2, 2, "not compiled")
    # 0.9 of ten key blocks of 16: one and the own blocks are kept
    assert report["sparsity"] == 0.9
    assert 0.5 < report["measured_sparsity"] < 0.9


def test_branches_of_a_file_and_the_table(command: Run, wan: Path, salad_file: Path) -> None:
    outcome = command("bench", wan, *SIZE, *QUICK, "--salad", salad_file, "--keep-lora")
    assert outcome.code == 0
    assert "sparsity 0.700" in outcome.out
    assert "LoRA unmerged" in outcome.out
    assert outcome.err == ""  # no bar where nobody watches


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--sparsity", "0.5"), "says how the model is converted: leave --sparsity out."),
        (("--device", "cuda:77"), "no device 'cuda:77' here"),
        (("--device", "gpu"), "no device 'gpu' here"),
    ],
)
def test_wrong_arguments(command: Run, wan: Path, salad_file: Path, words: tuple[str, ...], said: str) -> None:
    outcome = command("bench", wan, *SIZE, "--salad", salad_file, *words)
    assert outcome.code == WRONG
    assert said in outcome.err


def test_a_model_that_does_not_know_its_blocks(command: Run, tmp_path: Path) -> None:
    file = tmp_path / "inputs_of_mine.py"
    file.write_text(
        "import torch\ninputs = {'x': torch.zeros(1, 4, 2, 14, 22), 't': torch.zeros(1), "
        "'text': torch.zeros(1, 17, 24)}\n"
    )
    words = ("bench", "tests.models.handwritten:FusedDiT", "--random", "--inputs", f"{file}:inputs", *SETTINGS)
    outcome = command(*words, "--compile", "blocks")
    assert outcome.code == WRONG
    assert "--compile model" in outcome.err


def test_calls_are_timed_in_turns() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in ("dense", "salad")}
    cpu = torch.device("cpu")
    first = {name: first_call(call, cpu) for name, call in calls.items()}
    order.clear()
    advanced: list[None] = []
    times = time_in_turns(calls, first, cpu, steps=2, rounds=2, advance=lambda: advanced.append(None))
    warm_up = ["dense", "salad"]
    assert order == [*warm_up, *["dense"] * 2, *["salad"] * 4, *["dense"] * 2]
    assert len(advanced) == 4
    assert {name: len(timings.milliseconds) for name, timings in times.items()} == {"dense": 2, "salad": 2}


def test_median_and_spread() -> None:
    timings = Timings("dense", 0.0, [float(n) for n in (10, 1, 2, 3, 4, 5, 6, 7, 8, 9)], None)
    assert (timings.median, timings.spread) == (5.5, (2.0, 9.0))
