"""Precomputed latents and text embeddings: formats of other trainers and our own, read as one kind of dataset.

latents = open_latents("data")            # FastVideo parquet, musubi-tuner caches, finetrainers, our own
convert_latents("data", "mine")           # into our own format
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .batching import LatentBatch as LatentBatch
    from .batching import ShapeBatches as ShapeBatches
    from .batching import collate as collate
    from .converting import convert_latents as convert_latents
    from .item import LatentDataset as LatentDataset
    from .item import LatentItem as LatentItem
    from .native import write_latents as write_latents
    from .opening import open_latents as open_latents
    from .statistics import WAN_2_1 as WAN_2_1
    from .statistics import LatentStatistics as LatentStatistics

_HOMES = {
    "LatentBatch": "batching",
    "LatentDataset": "item",
    "LatentItem": "item",
    "LatentStatistics": "statistics",
    "ShapeBatches": "batching",
    "WAN_2_1": "statistics",
    "collate": "batching",
    "convert_latents": "converting",
    "open_latents": "opening",
    "write_latents": "native",
}

__all__ = [
    "WAN_2_1",
    "LatentBatch",
    "LatentDataset",
    "LatentItem",
    "LatentStatistics",
    "ShapeBatches",
    "collate",
    "convert_latents",
    "open_latents",
    "write_latents",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
