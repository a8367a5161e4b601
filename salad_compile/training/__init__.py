"""Fine-tuning of converted models on precomputed latents, with accelerate as the engine.

settings = TrainSettings(steps=1600, batch=8)
result = train(model, open_latents("data"), settings, "run")     # the same call goes on after an interruption
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .loop import TrainResult as TrainResult
    from .loop import train as train
    from .records import read_log as read_log
    from .settings import TrainSettings as TrainSettings

_HOMES = {"TrainResult": "loop", "TrainSettings": "settings", "read_log": "records", "train": "loop"}

__all__ = ["TrainResult", "TrainSettings", "read_log", "train"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
