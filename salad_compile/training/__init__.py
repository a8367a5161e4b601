"""Fine-tuning of converted models on precomputed latents, with accelerate as the engine.

settings = TrainSettings(steps=1600, batch=8)
result = train(model, open_latents("data"), settings, "run")     # the same call resumes after an interruption
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from salad_compile.common.lazy import lazy_names

if TYPE_CHECKING:
    from salad_compile.training.loop import train as train
    from salad_compile.training.outcome import Outcome as Outcome
    from salad_compile.training.outcome import TrainResult as TrainResult
    from salad_compile.training.records import read_log as read_log
    from salad_compile.training.settings import TrainSettings as TrainSettings

_HOMES = {
    "Outcome": "outcome",
    "TrainResult": "outcome",
    "TrainSettings": "settings",
    "read_log": "records",
    "train": "loop",
}

__all__ = ["Outcome", "TrainResult", "TrainSettings", "read_log", "train"]

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
