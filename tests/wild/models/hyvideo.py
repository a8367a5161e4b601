"""hyvideo: HunyuanVideo 1.5 as Tencent wrote it, with attention by torch."""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.wild.case import GRID, TEXT, Wild, draw
from tests.wild.models.copies import made

MODULE, NAME = "hyvideo.models.transformers.hunyuanvideo_1_5_transformer", "HunyuanVideo_1_5_DiffusionTransformer"
CONFIG: dict[str, Any] = {
    "in_channels": 4,
    "concat_condition": False,
    "out_channels": 4,
    "hidden_size": 24,
    "heads_num": 2,
    "mm_double_blocks_depth": 2,
    "mm_single_blocks_depth": 2,
    "rope_dim_list": [4, 4, 4],
    "text_states_dim": 16,
    "text_states_dim_2": None,
    "attn_mode": "torch",
}
# its torch mode masks text in a function of the scores
SCORES = "it has a score_mod of its own"


def inputs() -> dict[str, Any]:
    frames, height, width = GRID
    return {
        "hidden_states": draw(1, 4, frames, 2 * height, 2 * width),
        "timestep": torch.tensor([500.0]),
        "text_states": draw(1, TEXT, 16),
        "text_states_2": None,
        "encoder_attention_mask": torch.ones(1, TEXT, dtype=torch.int64),
    }


def model(module: str, parallel: str) -> Callable[[], nn.Module]:
    """Builds the class of `module` in one process. parallel: where its process groups are kept, for GPUs alone."""

    def make() -> nn.Module:
        state = importlib.import_module(parallel)
        state.ParallelDims = lambda **_: types.SimpleNamespace(sp=1, sp_enabled=False)
        state.initialize_parallel_state()
        return made(module, NAME, CONFIG)()

    return make


ENTRIES = {f"{MODULE}.{NAME}": Wild(model(MODULE, "hyvideo.commons.parallel_states"), inputs, refused=SCORES)}

WITHOUT_ENTRY: dict[str, str] = {}
