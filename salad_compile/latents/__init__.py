"""Precomputed latents and text embeddings: formats of other trainers and our own, read as one kind of dataset.

latents = open_latents("data")            # FastVideo parquet, caches of other trainers, our own
convert_latents("data", "mine")           # into our own format
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from salad_compile.common.lazy import lazy_names

if TYPE_CHECKING:
    from salad_compile.latents.batching import LatentBatch as LatentBatch
    from salad_compile.latents.batching import ShapeBatches as ShapeBatches
    from salad_compile.latents.batching import collate as collate
    from salad_compile.latents.converting import convert_latents as convert_latents
    from salad_compile.latents.item import LatentDataset as LatentDataset
    from salad_compile.latents.item import LatentItem as LatentItem
    from salad_compile.latents.native import write_latents as write_latents
    from salad_compile.latents.opening import open_latents as open_latents
    from salad_compile.latents.statistics import WAN_2_1 as WAN_2_1
    from salad_compile.latents.statistics import LatentStatistics as LatentStatistics

_HOMES = {
    "batching": ("LatentBatch", "ShapeBatches", "collate"),
    "converting": ("convert_latents",),
    "item": ("LatentDataset", "LatentItem"),
    "native": ("write_latents",),
    "opening": ("open_latents",),
    "statistics": ("LatentStatistics", "WAN_2_1"),
}

if not TYPE_CHECKING:
    __getattr__, __dir__, __all__ = lazy_names(__name__, _HOMES)
