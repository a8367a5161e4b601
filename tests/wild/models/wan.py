"""wan: Wan 2.2 as its authors wrote it, with its own function for torch's attention in place of flash_attn's."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.wild.case import GRID, TEXT, Wild, draw, numbered

FRAMES, HEIGHT, WIDTH = GRID
FACE = 16
CONFIG: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "text_len": 24,
    "dim": 48,
    "ffn_dim": 64,
    "freq_dim": 16,
    "text_dim": 20,
    "num_heads": 4,
    "num_layers": 2,
}


def fallback_of_faces(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, S, H, D): in place of flash_attn's function."""
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def _generator(generator: Any, *, size: int, style_dim: int, motion_dim: int) -> nn.Module:
    made: nn.Module = generator(size=min(size, FACE), style_dim=16, motion_dim=4)
    return made


def model(file: str, name: str, **config: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        with mock.patch("torch.cuda.current_device", return_value=0):  # a default argument in passing
            module = importlib.import_module(f"wan.modules.{file}")
        fallback = importlib.import_module("wan.modules.attention").attention
        for holder in (module, importlib.import_module("wan.modules.model")):
            holder.flash_attention = functools.partial(fallback, dtype=torch.float32)
        if (faces := sys.modules.get("wan.modules.animate.face_blocks")) is not None:
            faces.flash_attn_func = fallback_of_faces
        if isinstance(generator := getattr(module, "Generator", None), type):  # of faces, for tiny ones
            module.Generator = functools.partial(_generator, generator)
        built: nn.Module = getattr(module, name)(**CONFIG | config)
        return built

    return make


def inputs() -> dict[str, Any]:
    return {
        "x": [draw(4, FRAMES, 2 * HEIGHT, 2 * WIDTH)],
        "t": torch.tensor([500.0]),
        "context": [draw(TEXT, 20)],
        "seq_len": FRAMES * HEIGHT * WIDTH,
    }


WHOLE_HISTORY = 19
"""Earlier frames that fill the buckets of the model; of fewer it pads the sequence with tokens of zeros."""


def speech_inputs(history: int = WHOLE_HISTORY) -> dict[str, Any]:
    size = (2 * HEIGHT, 2 * WIDTH)
    return inputs() | {
        "x": [draw(16, FRAMES, *size)],
        "ref_latents": [draw(16, 1, *size)],
        "motion_latents": [draw(16, history, *size)],
        "cond_states": [draw(16, FRAMES, *size, seed=3)],
        "audio_input": draw(1, 25, 12, 4 * FRAMES),
    }


def animate_inputs() -> dict[str, Any]:
    size = (2 * HEIGHT, 2 * WIDTH)
    return inputs() | {
        "x": [draw(16, FRAMES, *size)],
        "clip_fea": draw(1, 257, 1280),
        "y": [draw(20, FRAMES, *size)],
        "pose_latents": [draw(16, FRAMES - 1, *size)],
        "face_pixel_values": draw(1, 3, 1 + 4 * (FRAMES - 2), FACE, FACE),
    }


SPEECH = model(
    "s2v.model_s2v",
    "WanModel_S2V",
    cond_dim=16,
    audio_dim=12,
    audio_inject_layers=[0],
    zero_timestep=True,
    enable_motioner=False,
    enable_framepack=True,
)

ENTRIES = {
    "wan.modules.model.WanModel": Wild(
        model("model", "WanModel", in_dim=4, out_dim=4),
        inputs,
        numbered("blocks.{}.self_attn"),
        blocks=numbered("blocks.{}"),
        fullgraph=False,
        breaks_inside=True,
    ),
    "wan.modules.s2v.model_s2v.WanModel_S2V": Wild(
        SPEECH,
        speech_inputs,
        numbered("blocks.{}.self_attn"),
        blocks=numbered("blocks.{}"),
        grid=None,
        flat="no argument shows a grid of 331 video tokens",  # those of the reference and of earlier frames among them
        fullgraph=False,
        breaks_inside=True,
    ),
    "wan.modules.s2v.model_s2v.WanModel_S2V:few_earlier_frames": Wild(
        SPEECH,
        functools.partial(speech_inputs, 5),
        refused="do not lie on one side of the video: 323 of the video from 'cond_states' and 'motion_latents' and "
        "'ref_latents' and 'x', 6 others from none of the inputs, 2 of the video from 'motion_latents'",
    ),
    "wan.modules.animate.model_animate.WanAnimateModel": Wild(
        model("animate.model_animate", "WanAnimateModel", num_layers=5),
        animate_inputs,
        numbered("blocks.{}.self_attn", 5),
        blocks=numbered("blocks.{}", 5),
        fullgraph=False,
        breaks_inside=True,
    ),
}

WITHOUT_ENTRY: dict[str, str] = {}
