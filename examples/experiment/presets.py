"""The sizes of the experiment: what is measured, and a tiny one that only checks that everything runs."""

from __future__ import annotations

from dataclasses import dataclass

from model import ModelSize
from train import Recipe
from videos import ClipSize


@dataclass(frozen=True)
class Preset:
    """Everything that all arms share.

    Attributes:
        block: tokens per block of queries and of keys. rank: of all low-rank updates.
        held_out: number of triples in the held-out loss. samples, sampler_steps: for PSNR and SSIM.
    """

    model: ModelSize
    dense: Recipe
    tune: Recipe
    block: int
    rank: int
    held_out: int
    samples: int
    sampler_steps: int
    evaluation_batch: int


# Fine-tuning sees 12,800 samples of 2,000 clips, as arXiv 2601.16515 does (1,600 steps of 8 there; fewer and larger
# steps suit a model as small as this one). Blocks are 64 x 64: 4,096 tokens are only 64 blocks of keys.
FULL = Preset(
    model=ModelSize(),
    dense=Recipe(steps=9_500, batch=32, rate=2.5e-3, warm_up=300, average=0.999),
    tune=Recipe(steps=400, batch=32, rate=6e-3, warm_up=20, clips=2_000),
    block=64,
    rank=16,
    held_out=512,
    samples=16,
    sampler_steps=20,
    evaluation_batch=64,
)

TINY = Preset(
    model=ModelSize(ClipSize(frames=4, edge=16), width=32, heads=2, layers=2, mlp_ratio=2),
    dense=Recipe(steps=2, batch=2, rate=1e-3, warm_up=1, average=0.9),
    tune=Recipe(steps=1, batch=2, rate=1e-3, warm_up=1, clips=4),
    block=16,
    rank=2,
    held_out=5,
    samples=1,
    sampler_steps=1,
    evaluation_batch=4,
)
