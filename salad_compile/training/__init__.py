"""Fine-tuning of converted models on precomputed latents, with accelerate as the engine.

settings = TrainSettings(steps=1600, batch=8)
result = train(model, open_latents("data"), settings, "run")     # the same call resumes after an interruption
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from salad_compile.common.lazy import lazy_names

if TYPE_CHECKING:
    from salad_compile.training.dry_run import Estimate as Estimate
    from salad_compile.training.dry_run import estimate as estimate
    from salad_compile.training.loop import train as train
    from salad_compile.training.outcome import Outcome as Outcome
    from salad_compile.training.outcome import TrainResult as TrainResult
    from salad_compile.training.records import read_log as read_log
    from salad_compile.training.settings import TrainSettings as TrainSettings

_HOMES = {
    "dry_run": ("Estimate", "estimate"),
    "loop": ("train",),
    "outcome": ("Outcome", "TrainResult"),
    "records": ("read_log",),
    "settings": ("TrainSettings",),
}

if not TYPE_CHECKING:
    __getattr__, __dir__, __all__ = lazy_names(__name__, _HOMES)
