from __future__ import annotations

import json
from pathlib import Path

import pytest

from salad_compile.command_line import NO, WRONG
from tests.salad_compile.command_line.conftest import SETTINGS, SIZE, Run

INPUTS = """
import torch

def inputs():
    return {"x": torch.zeros(1, 4, 2, 14, 22), "t": torch.zeros(1), "text": torch.zeros(1, 17, 24)}
"""


def test_the_table(command: Run, wan: Path) -> None:
    outcome = command("plan", wan / "config.json", *SIZE, *SETTINGS)
    assert outcome.code == 0
    assert "blocks.{0..1}.attn1" in outcome.out
    assert "2 of 4 attention calls are eligible at min_tokens=90." in outcome.out
    assert "\x1b" not in outcome.out
    assert outcome.err == ""


def test_json_with_both_experts_of_a_pipeline(command: Run, pipeline: Path) -> None:
    """The second has no weights, which plan does not need."""
    found = command("plan", pipeline, *SIZE, *SETTINGS, "--sites", "blocks.0.*", "--json").json()
    eligible = [(site["component"], site["name"]) for site in found["sites"] if site["eligible"]]
    assert eligible == [("transformer", "blocks.0.attn1"), ("transformer_2", "blocks.0.attn1")]
    assert found["eligible"] == 2
    assert found["config"]["query_block"] == 32


def test_one_expert(command: Run, pipeline: Path) -> None:
    found = command("plan", pipeline, *SIZE, *SETTINGS, "--component", "transformer_2", "--json").json()
    assert found["eligible"] == 2


def test_sizes_in_pixels(command: Run, wan: Path) -> None:
    """5 frames of 112 x 176 pixels are 2 x 14 x 22 latents of a VAE with strides 4, 8, 8: 2 x 7 x 11 tokens."""
    pixels = ("--frames", 5, "--height", 112, "--width", 176, "--text-tokens", 17)
    found = command("plan", wan, *pixels, *SETTINGS, "--json").json()
    assert [site["query_tokens"] for site in found["sites"] if site["eligible"]] == [154, 154]


def test_nothing_eligible_is_a_no(command: Run, wan: Path) -> None:
    outcome = command("plan", wan, *SIZE)
    assert outcome.code == NO
    assert "fewer than min_tokens=8192" in outcome.out


@pytest.mark.parametrize("random", [[], ["--random"]])
def test_a_model_of_ones_own(command: Run, tmp_path: Path, random: list[str]) -> None:
    file = tmp_path / "inputs_of_mine.py"
    file.write_text(INPUTS)
    words = ("plan", "tests.models.handwritten:FusedDiT", *SETTINGS, *random, "--json")
    found = command(*words, "--inputs", f"{file}:inputs").json()
    assert [site["name"] for site in found["sites"] if site["eligible"]] == ["blocks.0.attn", "blocks.1.attn"]


def test_inputs_that_cannot_be_made_up(command: Run) -> None:
    outcome = command("plan", "tests.models.handwritten:FusedDiT", *SETTINGS)
    assert outcome.code == WRONG
    assert "On the command line: --inputs file.py:function" in outcome.err


def test_a_forward_that_fails(command: Run, wan: Path) -> None:
    """The tiny model has positions for fewer pixels than the default size."""
    outcome = command("plan", wan, "--latent", "2x200x200")
    assert outcome.code == WRONG
    assert "On the command line: --random" in outcome.err
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--set", "gate=heads"), "gate must be one of 'token', 'head', 'none', got 'heads'. Did you mean 'head'?"),
        (("--set", "sparsety=0.5"), "Did you mean 'sparsity'?"),
        (("--set", "sparsity"), "--set takes FIELD=VALUE, got 'sparsity'."),
        (("--sparsity", "1.5"), "a number in [0, 1), got 1.5"),
        (("--frames", "5"), "--latent and --frames, --height, --width both say the size"),
        (("--settings", "nowhere.json"), "nowhere.json"),
        (("--sites", "layers.*"), "'layers.*'"),
    ],
)
def test_wrong_settings(command: Run, wan: Path, words: tuple[str, ...], said: str) -> None:
    outcome = command("plan", wan / "config.json", *SIZE, *words)
    assert outcome.code == WRONG
    assert said in outcome.err
    assert outcome.out == ""


def test_later_settings_win(command: Run, wan: Path, tmp_path: Path) -> None:
    settings = tmp_path / "salad.json"
    settings.write_text(json.dumps({"sparsity": 0.5, "gate": "head", "lora_rank": 8}))
    words = ("--settings", settings, "--set", "gate=none", "--set", "lora_rank=4", "--lora-rank", 2, "--min-tokens", 90)
    config = command("plan", wan, *SIZE, *words, "--set", "lowest_sparsity=None", "--json").json()["config"]
    shown = {name: config[name] for name in ("sparsity", "gate", "lora_rank", "min_tokens", "lowest_sparsity")}
    assert shown == {"sparsity": 0.5, "gate": "none", "lora_rank": 2, "min_tokens": 90, "lowest_sparsity": None}
