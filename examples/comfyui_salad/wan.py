"""Inputs of ComfyUI's Wan: from them `salad_compile.load` sees how it calls attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn

from salad_compile.errors import BaseModelMismatchError

TOKENS = (3, 6, 8)  # of the video: frames, rows, columns, no two the same
TEXT_TOKENS = 20
# of ComfyUI's Wan; derived models have more, and read inputs that are not made up here
PARTS = {"patch_embedding", "text_embedding", "time_embedding", "time_projection", "blocks", "head", "img_emb"}
PARTS |= {"rope_embedder"}
IMAGE_TOKENS = 257  # of the image encoder that Wan's image-to-video reads


def require_wan(model: nn.Module) -> None:
    """Raises BaseModelMismatchError if this is no Wan as ComfyUI has it."""
    if _shape(model, "patch_embedding") is None or _shape(model, "text_embedding.0") is None:
        raise BaseModelMismatchError(
            f"Load SALAD takes a Wan model, and this MODEL is a {type(model).__name__}: SALAD files of other families "
            "go into diffusers (docs/inference.md)."
        )
    derived = sorted(set(dict(model.named_children())) - PARTS)
    if derived:
        raise BaseModelMismatchError(
            f"Load SALAD takes Wan for text-to-video and image-to-video, and this MODEL is one with {derived[0]!r} "
            "besides: VACE, camera, audio and other derived models are not supported in ComfyUI."
        )


def example_inputs(model: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
    """Of one forward: a small video and text, of the model's channels, on its device."""
    channels, *patch = _shape(model, "patch_embedding")[1:]  # type: ignore[index]
    text = _shape(model, "text_embedding.0")[1]  # type: ignore[index]
    device = next(model.parameters()).device
    size = [count * step for count, step in zip(TOKENS, patch, strict=True)]
    inputs = {
        "x": torch.zeros(1, channels, *size, dtype=dtype, device=device),
        "timestep": torch.full((1,), 500.0, device=device),
        "context": torch.zeros(1, TEXT_TOKENS, text, dtype=dtype, device=device),
        "transformer_options": {},
    }
    image = _shape(model, "img_emb.proj.0")
    if image is not None:
        inputs["clip_fea"] = torch.zeros(1, IMAGE_TOKENS, image[0], dtype=dtype, device=device)
    return inputs


def _shape(model: nn.Module, name: str) -> torch.Size | None:
    """Of the weight of the submodule with this name, or None."""
    module: Any = model
    for part in name.split("."):
        module = getattr(module, part, None)
    weight = getattr(module, "weight", None)
    return weight.shape if isinstance(weight, torch.Tensor) else None
