"""The trainer on GPUs, by the commands that people type: bf16, Triton kernels, blocks compiled by Inductor, NCCL."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

import salad_compile
from salad_compile.latents import LatentItem, write_latents
from salad_compile.training import TrainSettings, read_log
from tests.support import seeded

ROOT = Path(__file__).resolve().parents[2]
SHAPE = (16, 5, 32, 34)  # 1,360 tokens: the last block of queries and the last of keys are short
CONFIG = salad_compile.SaladConfig(compensation="none", sparsity=0.8, lora_rank=8, min_tokens=1024)
SETTINGS = TrainSettings(
    steps=6,
    batch=4,
    learning_rate=1e-3,
    warmup_steps=2,
    text_tokens=16,
    checkpoint_every=3,
    distillation_steps=2,
)
ALONE = [sys.executable, "-m", "salad_compile", "train"]
LAUNCHED = {
    "ddp": ["--multi_gpu"],
    "fsdp2": [
        *("--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"),
        *("--fsdp_transformer_layer_cls_to_wrap", "WanTransformerBlock"),
    ],
}
# The base computes in bf16, of which a step is 2^-8; the mean over a batch of four sums in another order.
BOUND = 2.0**-7

pytestmark = pytest.mark.skipif(torch.cuda.device_count() == 0, reason="trains on a GPU")


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("given")
    with seeded(3):
        model = WanTransformer3DModel(
            num_attention_heads=6, attention_head_dim=128, num_layers=3, ffn_dim=1024, text_dim=32
        )
    model.to(torch.bfloat16).save_pretrained(root / "model")  # type: ignore[no-untyped-call]
    draw = torch.Generator().manual_seed(0)
    clips = [torch.randn(SHAPE, generator=draw) for _ in range(8)]
    texts = [torch.randn(3 + number, 32, generator=draw) for number in range(8)]
    write_latents((LatentItem(f"clip{i}", *pair) for i, pair in enumerate(zip(clips, texts, strict=True))), root / "x")
    (root / "settings.json").write_text(json.dumps(SETTINGS.to_dict()))
    (root / "conversion.json").write_text(json.dumps(CONFIG.to_dict()))
    return root


@pytest.fixture(scope="module")
def alone(given: Path) -> list[dict[str, Any]]:
    run(ALONE, given, "alone", {"CUDA_VISIBLE_DEVICES": "0"})
    return read_log(given / "alone")


def run(command: list[str], given: Path, name: str, environment: dict[str, str] | None = None) -> None:
    files = {"model": "model", "latents": "x", "settings": "settings.json", "conversion": "conversion.json"}
    words = [word for option, file in files.items() for word in (f"--{option}", str(given / file))]
    result = subprocess.run(
        [*command, *words, "--output", str(given / name)],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, **(environment or {})},
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]


def launcher(kind: str) -> list[str]:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--mixed_precision", "no"]
    launch += ["--num_machines", "1", "--dynamo_backend", "no", *LAUNCHED[kind]]
    return [*launch, str(ROOT / "examples" / "finetune.py")]


def losses_of(directory: Path) -> list[float]:
    return [line["loss"] for line in read_log(directory) if "loss" in line]


def test_one_gpu(given: Path, alone: list[dict[str, Any]]) -> None:
    assert [line["step"] for line in alone if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert all(0 < line["loss"] < 10 for line in alone if "loss" in line)
    trained = load_file(given / "alone" / "salad.safetensors")
    assert all(tensor.isfinite().all() for tensor in trained.values())
    moved = [name for name, tensor in trained.items() if name.endswith(("proj_weight", "_up")) and tensor.norm() > 0]
    assert len(moved) == 3 * 5  # of each block the projection and four updates, which start at zero


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("kind", LAUNCHED)
def test_two_gpus_train_as_one(given: Path, alone: list[dict[str, Any]], kind: str) -> None:
    run(launcher(kind), given, kind)
    assert losses_of(given / kind) == pytest.approx([line["loss"] for line in alone if "loss" in line], rel=BOUND)
    trained = load_file(given / kind / "salad.safetensors")
    assert trained.keys() == load_file(given / "alone" / "salad.safetensors").keys()
    stages = [line["stage"] for line in read_log(given / kind) if "stage" in line]
    assert stages == ["distillation"] * 2 + ["flow matching"] * 4
    assert (given / kind / "export" / "lora" / "peft" / "adapter_config.json").exists()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("begun", ["by two", "by one"])
def test_a_run_goes_on_with_another_number_of_gpus(given: Path, alone: list[dict[str, Any]], begun: str) -> None:
    directory = given / f"begun {begun}"
    commands = {"by two": (launcher("fsdp2"), {}), "by one": (ALONE, {"CUDA_VISIBLE_DEVICES": "0"})}
    run(commands[begun][0], given, directory.name, commands[begun][1])
    shutil.rmtree(directory / "checkpoints" / "step-00000006")
    (other,) = (command for key, command in commands.items() if key != begun)
    run(other[0], given, directory.name, other[1])
    assert losses_of(directory) == pytest.approx([line["loss"] for line in alone if "loss" in line], rel=BOUND)
