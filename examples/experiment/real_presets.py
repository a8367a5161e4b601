"""The sizes of the experiment on real videos.

What to expect of an H200, in floating-point operations. One clip has S = 16 x 32 x 32 = 16,384 tokens. Attention of 8
layers of width 384: 4 S^2 x 384 x 8 = 3.3 TFLOP forward, 3.5 times that with the backward pass, 11.5. Everything else:
2 S x 12 million = 0.4 TFLOP forward, 1.2 in all. At 350 to 500 TFLOP/s for attention and 300 for the rest, and 3 ms for
what only moves data, that is 30 to 40 ms a clip: 3 to 4 steps of 8 in a second, about 1,000 in five minutes. Width 512
would need a third more, and 768 twice as much. Of 4,096 tokens (stage one) a clip takes about 4 ms: three minutes
are 1,200 steps of 32. At 90 % sparsity, with the base frozen, a clip takes 10 to 15 ms.
"""

from __future__ import annotations

from dataclasses import dataclass

from model import ModelSize
from presets import Preset
from train import Recipe
from videos import ClipSize


@dataclass(frozen=True)
class Stage:
    """One part of the pre-training.

    Attributes:
        clip: its size. share: of the time. batch: of clips. rate: the highest learning rate, after `warm_up` steps.
        falls: whether the rate falls to zero by a cosine, or stays.
    """

    clip: ClipSize
    share: float
    batch: int
    rate: float
    warm_up: int
    falls: bool = True


@dataclass(frozen=True)
class RealPreset:
    """Everything that all arms share.

    Attributes:
        sizes: the model, and what `arms.py` reads. stages: of the pre-training, in their order.
        micro_batch: clips of one forward. chunk: steps between two looks at the clock, or three or nine times as many.
            ema: of the trained parameters. compared: the step at which arms are compared.
        restored_level, restored_steps: for clips that are noised and restored.
    """

    sizes: Preset
    stages: tuple[Stage, ...]
    micro_batch: int
    chunk: int
    ema: float
    compared: int
    restored_level: float = 0.7
    restored_steps: int = 10


_CLIP = ClipSize(frames=16, edge=128)
REAL = RealPreset(
    sizes=Preset(
        model=ModelSize(_CLIP, width=384, heads=3, layers=8, mlp_ratio=3),
        dense=Recipe(steps=1_000_000, batch=8, rate=1e-3, warm_up=50),  # steps: as many as the time allows
        tune=Recipe(steps=800, batch=16, rate=2e-3, warm_up=20),
        block=64,
        rank=16,
        held_out=128,
        samples=8,
        sampler_steps=20,
        evaluation_batch=8,
    ),
    stages=(
        Stage(ClipSize(frames=16, edge=64), 0.4, batch=32, rate=1.2e-3, warm_up=100, falls=False),
        Stage(_CLIP, 0.6, batch=8, rate=8e-4, warm_up=50),
    ),
    micro_batch=8,
    chunk=20,
    ema=0.98,
    compared=80,
)

_SMALL = ClipSize(frames=4, edge=32)
TINY_REAL = RealPreset(
    sizes=Preset(
        model=ModelSize(_SMALL, width=32, heads=2, layers=2, mlp_ratio=2),
        dense=Recipe(steps=1_000_000, batch=2, rate=1e-3, warm_up=1),
        tune=Recipe(steps=4, batch=2, rate=1e-3, warm_up=1),
        block=16,
        rank=2,
        held_out=10,
        samples=1,
        sampler_steps=1,
        evaluation_batch=2,
    ),
    stages=(
        Stage(ClipSize(frames=4, edge=16), 0.5, batch=2, rate=1e-3, warm_up=1, falls=False),
        Stage(_SMALL, 0.5, batch=2, rate=1e-3, warm_up=1),
    ),
    micro_batch=1,
    chunk=2,
    ema=0.5,
    compared=2,
    restored_steps=1,
)
