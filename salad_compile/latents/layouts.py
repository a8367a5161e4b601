"""The layouts of precomputed data by name. Nothing heavy is imported: the command line lists them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeAlias

Readable: TypeAlias = Literal[
    "salad", "fastvideo", "musubi", "finetrainers", "aitoolkit", "diffsynth", "diffusionpipe", "ltx"
]
Writable: TypeAlias = Literal["salad", "fastvideo", "musubi"]


@dataclass(frozen=True)
class Layout:
    """One layout.

    files: how it is recognised. module, reader: where its :class:`LatentSource` is. writable: whether
    `convert_latents` writes it.
    """

    files: str
    module: str
    reader: str
    writable: bool = False


LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        "salad": Layout("info.json and items.jsonl", "native", "NativeSource", writable=True),
        "fastvideo": Layout("*.parquet below it", "fastvideo", "FastVideoSource", writable=True),
        "musubi": Layout(
            "*_<width>x<height>_wan.safetensors with *_wan_te.safetensors", "musubi", "MusubiSource", writable=True
        ),
        "finetrainers": Layout("latent-<i>.pt with condition-<i>.pt", "finetrainers", "FinetrainersSource"),
        "aitoolkit": Layout("_latent_cache with _t_e_cache", "aitoolkit", "AIToolkitSource"),
        "diffsynth": Layout("<rank>/<n>.pth", "diffsynth", "DiffSynthSource"),
        "diffusionpipe": Layout(
            "latents/metadata.db with text_embeddings_<i>/metadata.db", "diffusion_pipe", "DiffusionPipeSource"
        ),
        "ltx": Layout(".precomputed/latents/*.pt with .precomputed/conditions/*.pt", "ltx", "LTXSource"),
    }
)
WRITABLE = tuple(name for name, layout in LAYOUTS.items() if layout.writable)
