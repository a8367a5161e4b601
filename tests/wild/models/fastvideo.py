"""fastvideo: its own implementations, with linear layers that return a bias, and attention that could be distributed.

Built as for one process: a group of one over gloo, attention by torch.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from tests.wild.case import GRID, TEXT, Wild, draw, numbered

DITS, CONFIGS = "fastvideo.models.dits", "fastvideo.configs.models.dits"
FRAMES, HEIGHT, WIDTH = GRID


@functools.cache
def one_process() -> None:
    """What fastvideo's own start does, once."""
    os.environ["FASTVIDEO_ATTENTION_BACKEND"] = "TORCH_SDPA"
    os.environ["FASTVIDEO_DISABLE_ATTENTION_COMPILE"] = "0"
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("LOCAL_RANK", "0")
    platforms = importlib.import_module("fastvideo.platforms.cpu")  # knows no attention; torch's serves
    platforms.CpuPlatform.get_attn_backend_cls = classmethod(
        lambda *a, **k: "fastvideo.attention.backends.sdpa.SDPABackend"
    )
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    state = importlib.import_module("fastvideo.distributed.parallel_state")
    state.init_distributed_environment(world_size=1, rank=0, local_rank=0, backend="gloo")
    state.initialize_model_parallel(1, 1)


def forward_context() -> AbstractContextManager[Any]:
    context = importlib.import_module("fastvideo.forward_context")
    manager: AbstractContextManager[Any] = context.set_forward_context(current_timestep=0, attn_metadata=None)
    return manager


def model(file: str, name: str, config: str, **architecture: Any) -> Callable[[], nn.Module]:
    """Builds class `name` from `config`, with the architecture of that name with other values."""

    def make() -> nn.Module:
        one_process()
        configs = importlib.import_module(f"{CONFIGS}.{config.partition('.')[0]}")
        whole = getattr(configs, config.partition(".")[2])()
        whole.arch_config = type(whole.arch_config)(**architecture)
        built: nn.Module = getattr(importlib.import_module(f"{DITS}.{file}"), name)(config=whole, hf_config={})
        return built

    return make


def inputs(channels: int = 4, patch: int = 2, text: int = 20, **more: Any) -> Callable[[], dict[str, Any]]:
    def make() -> dict[str, Any]:
        return {
            "hidden_states": draw(1, channels, FRAMES, patch * HEIGHT, patch * WIDTH),
            "encoder_hidden_states": draw(1, TEXT, text),
            "timestep": torch.tensor([500.0]),
            **{name: value() if callable(value) else value for name, value in more.items()},
        }

    return make


WAN = {
    "num_attention_heads": 4,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 20,
    "freq_dim": 16,
    "ffn_dim": 64,
    "num_layers": 2,
}
COSMOS = {
    "in_channels": 5,
    "out_channels": 4,
    "num_attention_heads": 4,
    "attention_head_dim": 12,
    "num_layers": 2,
    "mlp_ratio": 2.0,
    "text_embed_dim": 20,
    "adaln_lora_dim": 8,
    "concat_padding_mask": False,
}
GEN3C = {**COSMOS, "in_channels": 4, "CHANNELS_PER_BUFFER": 4, "frame_buffer_max": 1}
KANDINSKY = {
    "in_visual_dim": 4,
    "out_visual_dim": 4,
    "in_text_dim": 20,
    "in_text_dim2": 10,
    "time_dim": 16,
    "model_dim": 48,
    "ff_dim": 64,
    "num_text_blocks": 1,
    "num_visual_blocks": 2,
    "axes_dims": (4, 4, 4),
}
LINGBOT = {
    "in_channels": 4,
    "out_channels": 4,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "depth": 2,
    "intermediate_size": 64,
    "text_dim": 20,
    "freq_dim": 16,
    "axes_dims": (4, 4, 4),
    "axes_lens": (64, 64, 64),
}
LONGCAT = {
    "hidden_size": 48,
    "depth": 2,
    "num_attention_heads": 3,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "num_channels_latents": 4,
    "caption_channels": 20,
    "adaln_tembed_dim": 16,
    "frequency_embedding_size": 16,
}
HUNYUAN = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 4,
    "attention_head_dim": 12,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "rope_axes_dim": (4, 4, 4),
    "text_embed_dim": 20,
    "pooled_projection_dim": 10,
}


def wild(build: Callable[[], nn.Module], feed: Callable[[], dict[str, Any]], *sites: str, **more: Any) -> Wild:
    more.setdefault("blocks", tuple(dict.fromkeys(".".join(site.split(".")[:2]) for site in sites)))
    return Wild(build, feed, sites, around=forward_context, **more)


def two_texts(size: int = 10) -> list[torch.Tensor]:
    """Tokens, and one vector for all of them."""
    return [draw(1, TEXT, 20), draw(1, size)]


def hunyuan15() -> dict[str, Any]:
    return {
        "encoder_hidden_states": [draw(1, TEXT, 20), draw(1, 5, 12)],
        "encoder_hidden_states_image": [torch.zeros(1, 3, 14)],
    }


def kandinsky() -> dict[str, Any]:
    return {
        "hidden_states": draw(1, FRAMES, 2 * HEIGHT, 2 * WIDTH, 4),
        "encoder_hidden_states": draw(1, TEXT, 20),
        "timestep": torch.tensor([500.0]),
        "pooled_projections": draw(1, 10),
        "visual_rope_pos": [torch.arange(size) for size in GRID],
        "text_rope_pos": torch.arange(TEXT),
    }


HUNYUAN15 = {
    **{key: value for key, value in HUNYUAN.items() if key not in ("pooled_projection_dim", "num_single_layers")},
    "text_embed_2_dim": 12,
    "image_embed_dim": 14,
    "patch_size": 1,
}
GAMECRAFT = {**HUNYUAN, "camera_net": False, "patch_size": (1, 2, 2)}


def _entry(file: str, name: str, config: str, feed: Any, sites: tuple[str, ...], architecture: Any, **more: Any) -> Any:
    return f"{DITS}.{file}.{name}", wild(model(file, name, config, **architecture), feed, *sites, **more)


BLOCKS = numbered("blocks.{}")
COSMOS_SITES = numbered("transformer_blocks.{}.attn1")

ENTRIES: dict[str, Wild] = dict(
    [
        _entry("wanvideo", "WanTransformer3DModel", "wanvideo.WanVideoConfig", inputs(), BLOCKS, WAN),
        _entry(
            "causal_wanvideo",
            "CausalWanTransformer3DModel",
            "wanvideo.WanVideoConfig",
            inputs(timestep=lambda: torch.full((1, FRAMES), 500.0)),
            BLOCKS,
            WAN,
            refused="it has a block mask of its own",
        ),
        _entry(
            "cosmos", "CosmosTransformer3DModel", "cosmos.CosmosVideoConfig", inputs(channels=5), COSMOS_SITES, COSMOS
        ),
        _entry(
            "cosmos2_5",
            "Cosmos25Transformer3DModel",
            "cosmos2_5.Cosmos25VideoConfig",
            inputs(channels=6),
            COSMOS_SITES,
            COSMOS,
        ),
        _entry(
            "gen3c",
            "Gen3CTransformer3DModel",
            "gen3c.Gen3CVideoConfig",
            inputs(channels=4),
            COSMOS_SITES,
            GEN3C,
        ),
        _entry(
            "dreamx_world",
            "DreamXWorldTransformer3DModel",
            "dreamx_world.DreamXWorldConfig",
            inputs(),
            BLOCKS,
            {**WAN, "add_control_adapter": False, "cam_method": None},
        ),
        _entry(
            "hunyuanvideo",
            "HunyuanVideoTransformer3DModel",
            "hunyuanvideo.HunyuanVideoConfig",
            inputs(encoder_hidden_states=two_texts),
            (*numbered("double_blocks.{}"), *numbered("single_blocks.{}")),
            HUNYUAN,
        ),
        _entry(
            "hunyuanvideo15",
            "HunyuanVideo15Transformer3DModel",
            "hunyuanvideo15.HunyuanVideo15Config",
            inputs(patch=1, **hunyuan15()),
            numbered("double_blocks.{}"),
            HUNYUAN15,
            fullgraph=False,  # it asks whether its image is empty
            vanish=("double_blocks.1.salad.low_rank_text_", "double_blocks.1.txt_"),  # nothing reads its text
        ),
        _entry(
            "hunyuangamecraft",
            "HunyuanGameCraftTransformer3DModel",
            "hunyuangamecraft.HunyuanGameCraftConfig",
            lambda: {
                "x": draw(1, 4, FRAMES, 2 * HEIGHT, 2 * WIDTH),
                "encoder_hidden_states": two_texts(),
                "timestep": torch.tensor([500.0]),
            },
            (*numbered("double_blocks.{}"), *numbered("single_blocks.{}")),
            GAMECRAFT,
        ),
        _entry(
            "kandinsky5",
            "Kandinsky5Transformer3DModel",
            "kandinsky5.Kandinsky5VideoConfig",
            kandinsky,
            numbered("visual_transformer_blocks.{}.self_attention"),
            KANDINSKY,
        ),
        _entry(
            "lingbot_video",
            "LingBotVideoTransformer3DModel",
            "lingbot_video.LingBotVideoConfig",
            inputs(),
            numbered("blocks.{}.attn"),
            LINGBOT,
            fullgraph=False,  # its rope compares a number read from a tensor
        ),
        _entry(
            "lingbotworld.model",
            "LingBotWorldTransformer3DModel",
            "lingbotworld.LingBotWorldVideoConfig",
            inputs(),
            BLOCKS,
            WAN,
        ),
        _entry(
            "longcat",
            "LongCatTransformer3DModel",
            "longcat.LongCatVideoConfig",
            inputs(),
            numbered("blocks.{}.self_attn"),
            LONGCAT,
        ),
        _entry(
            "matrixgame2.model",
            "MatrixGame2WanModel",
            "matrixgame2.MatrixGame2WanVideoConfig",
            inputs(encoder_hidden_states_image=lambda: draw(1, TEXT, 20)),
            BLOCKS,
            {**WAN, "text_dim": 0, "image_dim": 20, "action_config": {}, "added_kv_proj_dim": None},
        ),
        _entry(
            "matrixgame2.causal_model",
            "CausalMatrixGame2WanModel",
            "matrixgame2.MatrixGame2WanVideoConfig",
            inputs(
                encoder_hidden_states_image=lambda: draw(1, TEXT, 20), timestep=lambda: torch.full((1, FRAMES), 500.0)
            ),
            BLOCKS,
            {**WAN, "text_dim": 0, "image_dim": 20, "action_config": {}},
            refused="it has a block mask of its own",
        ),
        _entry(
            "matrixgame3.model",
            "MatrixGame3WanModel",
            "matrixgame3.MatrixGame3WanVideoConfig",
            inputs(),
            BLOCKS,
            {**WAN, "action_config": {}, "use_memory": False},
        ),
    ]
)

NOT_YET = "not tried yet: no tiny configuration and inputs for it"

WITHOUT_ENTRY: dict[str, str] = {
    f"{DITS}.lingbotworld2.causal_fast.LingBotWorld2CausalFastTransformer3DModel": "attends to a cache of keys alone",
    f"{DITS}.dreamx_world_ar.DreamXWorldARTransformer3DModel": "attends to a cache of keys alone",
    f"{DITS}.ltx2.LTXModel": NOT_YET,
    f"{DITS}.hyworld.hyworld.HYWorldTransformer3DModel": NOT_YET,
    f"{DITS}.minimax_h3.MiniMaxH3Transformer3DModel": NOT_YET,
    "fastvideo.models.encoders.lingbot_video.LingBotVideoQwen3VLTextModel": "encodes text",
    "fastvideo.models.encoders.qwen3.Qwen3ForCausalLM": "encodes text",
    "fastvideo.third_party.synchformer.motionformer.MotionFormer": "rates how sound and video fit, makes none",
    f"{DITS}.flux.FluxTransformer2DModel": "makes images",
    f"{DITS}.flux_2.Flux2Transformer2DModel": "makes images",
    f"{DITS}.sd3.SD3Transformer2DModel": "makes images",
    f"{DITS}.mmaudio.MMAudioTransformer": "makes sound",
    "fastvideo.models.vaes.gamecraftvae_blocks.UNetMidBlockCausal3D": "a part of a VAE: convolutions",
    "fastvideo.models.vaes.ltx2vae.VideoDecoder": "a decoder of latents: convolutions",
}
