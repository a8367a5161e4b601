"""xfuser: classes of diffusers with attention that several processes share, here for one."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any
from unittest import mock

from torch import nn

from tests.models.registry import ALL_CASES
from tests.models.zoo import WAN
from tests.models.zoo_joint import HUNYUAN
from tests.wild.case import Wild
from tests.wild.models.copies import copy_of
from tests.wild.models.fastvideo import one_process as _one_process

MODELS = "xfuser.model_executor.models.transformers"


@functools.cache
def one_process() -> None:
    """What xfuser's own start does, once; importing it needs to see some accelerator."""
    _one_process()
    with mock.patch("torch.backends.mps.is_available", return_value=True):
        state = importlib.import_module("xfuser.core.distributed.parallel_state")
        importlib.import_module("xfuser.model_executor.layers.usp")
    state.init_distributed_environment(rank=0, world_size=1, local_rank=0, backend="gloo")
    state.initialize_model_parallel(backend="gloo")
    runtime = importlib.import_module("xfuser.core.distributed.runtime_state")
    running = runtime.ExternalRuntimeState()
    running.increment_step_counter = lambda: None  # of steps with other backends, which that state has not
    kinds = importlib.import_module("xfuser.core.distributed.attention_backend").AttentionBackendType
    running.attention_backend = kinds.SDPA
    runtime._RUNTIME = running


def loaded(file: str, name: str) -> type[nn.Module]:
    one_process()
    with mock.patch("torch.backends.mps.is_available", return_value=True):
        found: type[nn.Module] = getattr(importlib.import_module(f"{MODELS}.{file}"), name)
    return found


def subclass(file: str, name: str, config: dict[str, Any]) -> Callable[[], nn.Module]:
    return lambda: loaded(file, name)(**config)


def wrapper(file: str, name: str, case: str, **changes: Any) -> Wild:
    """The entry of a wrapper around the model of our zoo's case."""
    sites, blocks = (
        tuple(f"module.{inside}" for inside in names)
        for names in (ALL_CASES[case].sites, ALL_CASES[case].repeated_blocks)
    )
    build = lambda: loaded(file, name)(transformer=ALL_CASES[case].build())  # noqa: E731
    return copy_of(case, build, sites=sites, blocks=blocks, **changes)


LTX2: dict[str, Any] = {
    "in_channels": 8,
    "out_channels": 8,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "cross_attention_dim": 32,
    "num_layers": 2,
    "caption_channels": 16,
    "audio_in_channels": 6,
    "audio_out_channels": 6,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": 16,
}
HUNYUAN15: dict[str, Any] = {
    "in_channels": 9,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 2,
    "num_refiner_layers": 1,
    "mlp_ratio": 2.0,
    "text_embed_dim": 16,
    "text_embed_2_dim": 8,
    "image_embed_dim": 14,
    "rope_axes_dim": (4, 4, 4),
    "task_type": "t2v",
}
VACE = {"vace_layers": [0, 1], "vace_in_channels": 6}


def _entry(case: str, file: str, name: str, config: dict[str, Any], **changes: Any) -> Wild:
    return copy_of(case, subclass(file, name, config), **changes)


ENTRIES: dict[str, Wild] = {
    f"{MODELS}.transformer_wan.xFuserWanTransformer3DWrapper": _entry(
        "Wan", "transformer_wan", "xFuserWanTransformer3DWrapper", WAN
    ),
    f"{MODELS}.transformer_wan_vace.xFuserWanVACETransformer3DWrapper": _entry(
        "WanVACE", "transformer_wan_vace", "xFuserWanVACETransformer3DWrapper", WAN | VACE
    ),
    f"{MODELS}.transformer_hunyuan_video.xFuserHunyuanVideoTransformer3DWrapper": _entry(
        "HunyuanVideo",
        "transformer_hunyuan_video",
        "xFuserHunyuanVideoTransformer3DWrapper",
        HUNYUAN | {"guidance_embeds": True},
        fullgraph=False,
    ),
    f"{MODELS}.transformer_hunyuan_video15.xFuserHunyuanVideo15Transformer3DWrapper": _entry(
        "HunyuanVideo15", "transformer_hunyuan_video15", "xFuserHunyuanVideo15Transformer3DWrapper", HUNYUAN15
    ),
    f"{MODELS}.transformer_ltx2.xFuserLTX2VideoTransformer3DWrapper": _entry(
        "LTX2Video", "transformer_ltx2", "xFuserLTX2VideoTransformer3DWrapper", LTX2
    ),
    f"{MODELS}.cogvideox_transformer_3d.xFuserCogVideoXTransformer3DWrapper": wrapper(
        "cogvideox_transformer_3d", "xFuserCogVideoXTransformer3DWrapper", "CogVideoX"
    ),
    f"{MODELS}.consisid_transformer_3d.xFuserConsisIDTransformer3DWrapper": wrapper(
        "consisid_transformer_3d", "xFuserConsisIDTransformer3DWrapper", "ConsisID"
    ),
    f"{MODELS}.latte_transformer_3d.xFuserLatteTransformer3DWrapper": wrapper(
        "latte_transformer_3d",
        "xFuserLatteTransformer3DWrapper",
        "Latte",
        grid=None,
        flat="neither a configured",
        fullgraph=False,
    ),
}

NOT_YET = "not tried yet: needs the caches, or the packed sequence of text, sound and video, that its pipeline makes"

WITHOUT_ENTRY: dict[str, str] = {
    f"{MODELS}.transformer_causal_wan.xFuserCausalWanTransformer3DWrapper": NOT_YET,
    f"{MODELS}.transformer_minimax_h3.xFuserMiniMaxH3Transformer3DWrapper": NOT_YET,
}
