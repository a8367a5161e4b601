"""ltx_video: the original LTX-Video."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

from tests.wild.case import GRID, TEXT, Wild, draw, numbered

MODULE = "ltx_video.models.transformers.transformer3d"


def model() -> nn.Module:
    built: nn.Module = importlib.import_module(MODULE).Transformer3DModel(
        num_attention_heads=4,
        attention_head_dim=12,
        in_channels=8,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=48,
        caption_channels=20,
        norm_elementwise_affine=False,
        adaptive_norm="single_scale_shift",
        standardization_norm="rms_norm",
        positional_embedding_type="rope",
        positional_embedding_theta=10000.0,
        positional_embedding_max_pos=[20, 2048, 2048],
        timestep_scale_multiplier=1000,
        qk_norm="rms_norm",
        attention_bias=True,
        activation_fn="gelu-approximate",
    )
    return built


def inputs() -> dict[str, Any]:
    frames, height, width = GRID
    axes = torch.meshgrid(*(torch.arange(float(size)) for size in GRID), indexing="ij")
    return {
        "hidden_states": draw(1, frames * height * width, 8),
        "indices_grid": torch.stack([axis.flatten() for axis in axes])[None],
        "encoder_hidden_states": draw(1, TEXT, 20),
        "timestep": torch.tensor([0.5]),
        "return_dict": False,
    }


ENTRIES = {
    f"{MODULE}.Transformer3DModel": Wild(
        model,
        inputs,
        numbered("transformer_blocks.{}.attn1"),
        blocks=numbered("transformer_blocks.{}"),
        grid=None,
    )
}

WITHOUT_ENTRY: dict[str, str] = {}
