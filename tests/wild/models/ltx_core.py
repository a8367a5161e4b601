"""ltx_core: the original LTX-2, here without its audio half."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

from tests.wild.case import GRID, TEXT, Wild, draw, numbered

TRANSFORMER = "ltx_core.model.transformer"


def model() -> nn.Module:
    module = importlib.import_module(f"{TRANSFORMER}.model")
    built: nn.Module = module.LTXModel(
        model_type=module.LTXModelType.VideoOnly,
        num_attention_heads=4,
        attention_head_dim=12,
        in_channels=8,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=48,
    )
    return built


def inputs() -> dict[str, Any]:
    frames, height, width = GRID
    axes = torch.meshgrid(*(torch.arange(float(size)) for size in GRID), indexing="ij")
    starts = torch.stack([axis.flatten() for axis in axes])[None]
    modality = importlib.import_module(f"{TRANSFORMER}.modality").Modality
    guidance = importlib.import_module("ltx_core.guidance.perturbations")
    return {
        "video": modality(
            latent=draw(1, frames * height * width, 8),
            sigma=torch.tensor([0.5]),
            timesteps=torch.full((1, frames * height * width), 0.5),
            positions=torch.stack([starts, starts + 1], dim=-1),
            context=draw(1, TEXT, 48),
        ),
        "audio": None,
        "perturbations": guidance.BatchedPerturbationConfig.empty(1),
    }


ENTRIES = {
    f"{TRANSFORMER}.model.LTXModel": Wild(
        model,
        inputs,
        numbered("transformer_blocks.{}.attn1"),
        blocks=numbered("transformer_blocks.{}"),
        grid=None,
    )
}

WITHOUT_ENTRY = {"ltx_core.model.video_vae.video_vae.VideoDecoder": "a decoder of latents: convolutions"}
