"""A tiny Wan, tiny latents and settings for the tests of the trainer: 48 tokens, two blocks."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import salad_compile
from salad_compile.latents import LatentDataset, LatentItem, open_latents, write_latents
from salad_compile.training import TrainSettings
from tests.models.zoo import WAN, from_diffusers, randomise
from tests.support import seeded

SHAPE = (4, 3, 8, 8)
# the placement that costs the uncompiled model least time
CONFIG = salad_compile.SaladConfig(
    compensation="none",
    sparsity=0.7,
    lowest_sparsity=0.2,
    query_block=16,
    key_block=16,
    lora_rank=2,
    lora_alpha=2.0,
    min_tokens=16,
    rope_placement="rotate-then-map",
)
SETTINGS = TrainSettings(
    steps=6,
    batch=4,
    micro_batch=2,
    learning_rate=1e-2,
    warmup_steps=3,
    text_tokens=8,
    text_dropout=0.3,
    precision="fp32",
    gradient_checkpointing=False,
    compile="none",
    checkpoint_every=2,
    workers=0,
)


def base(**changes: Any) -> Any:
    """Always the same weights."""
    with seeded(3):
        return randomise(from_diffusers("WanTransformer3DModel", WAN | changes), 3)


def wan_forward(model: Any, noisy: Tensor, timesteps: Tensor, texts: Tensor, *conditions: Any) -> Tensor:
    """A forward as users write it, of text to video."""
    velocity: Tensor
    (velocity,) = model(hidden_states=noisy, timestep=timesteps, encoder_hidden_states=texts, return_dict=False)
    return velocity


@cache
def _converted() -> Any:
    model = base(num_layers=1)
    example = {
        "hidden_states": torch.zeros(1, *SHAPE),
        "timestep": torch.zeros(1),
        "encoder_hidden_states": torch.zeros(1, 8, 16),
    }
    with seeded(0):
        return salad_compile.convert(model, CONFIG, example_inputs=example)


def converted() -> Any:
    """A new model of one block, converted, always the same."""
    return copy.deepcopy(_converted())


def write_run(root: Path, settings: TrainSettings) -> None:
    """What a command that trains is given: a base model, latents, held-out ones, and both files of settings."""
    base(num_layers=1).save_pretrained(root / "model")
    latents(root / "latents")
    latents(root / "held-out", 2, prefix="held", seed=9)
    (root / "settings.json").write_text(json.dumps(settings.to_dict()))
    (root / "conversion.json").write_text(json.dumps(CONFIG.to_dict()))


def items(count: int = 9, *, prefix: str = "clip", seed: int = 0) -> Iterable[LatentItem]:
    """Latents of one shape and texts of several lengths."""
    draw = torch.Generator().manual_seed(seed)
    for number in range(count):
        latent = torch.randn(SHAPE, generator=draw)
        yield LatentItem(f"{prefix}{number}", latent, torch.randn(3 + number % 4, 16, generator=draw))


def latents(directory: Path, count: int = 9, **changes: Any) -> LatentDataset:
    """Written once, and opened."""
    if not directory.exists():
        write_latents(items(count, **changes), directory)
    return open_latents(directory)
