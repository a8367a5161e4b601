"""Tiny video DiTs that need more than one unmasked sequence: masks, caches, packed tokens, flex_attention, or no site.

As in `zoo.py`, every site sees 154 or 216 video tokens, except where a family wants whole tiles of 8x8 tokens or an
even number of frames. A cache is an input: every call of `inputs` makes a new one.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from tests.models.zoo import GRIDS, TEXT, WAN, Case, Draw, Grid, from_diffusers, linears, make_case, numbered

TILES: tuple[Grid, Grid] = ((2, 8, 16), (3, 16, 8))  # whole tiles of 8x8: 256 and 384 tokens
VALID = 13  # text tokens that are no padding


def _module(name: str) -> Any:
    return importlib.import_module(f"diffusers.models.transformers.{name}")


def _mask(length: int = TEXT) -> Tensor:
    return (torch.arange(length) < VALID)[None]


def _audio_and_video(output: Any) -> Tensor:
    return torch.cat([output.sample.flatten(1), output.audio_sample.flatten(1)], dim=1)


def _first(output: Any) -> Tensor:
    tensor: Tensor = output.sample[0]
    return tensor


# ---------------------------------------------------------------- WanAnimate2

WAN_ANIMATE2: dict[str, Any] = {
    "text_len": TEXT,
    "in_dim": 6,
    "dim": 24,
    "ffn_dim": 48,
    "freq_dim": 32,
    "text_dim": 16,
    "out_dim": 4,
    "num_heads": 2,
    "num_layers": 2,
    "use_img_emb": False,
}


def _animate2_inputs(draw: Draw, grid: Grid) -> dict[str, Any]:
    size = (2 * grid[1], 2 * grid[2])
    return {
        "hidden_states": [draw(4, grid[0], *size)],
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": [draw(VALID, 16)],  # padded to text_len inside
        "condition_latents": [draw(2, grid[0], *size)],
        "kv_cache": _module("transformer_wan_animate_2").WanAnimate2KVCache(2),
        "seq_len": math.prod(grid),
    }


def _animate2_extract_inputs(draw: Draw, grid: Grid) -> dict[str, Any]:
    return _animate2_inputs(draw, grid) | {
        "kv_cache_mode": "extract",
        "offset_grid_sizes": torch.tensor([grid]),
        "encoder_hidden_states_image": draw(1, 5, 1280),
    }


def _animate2_cached_inputs(draw: Draw, grid: Grid) -> dict[str, Any]:
    # The video has one frame more than its reference.
    inputs = _animate2_inputs(draw, grid)
    reference = (grid[0] - 1, *grid[1:])
    for layer in inputs["kv_cache"].layer_caches:
        layer.store(draw(1, math.prod(reference), 2, 12), draw(1, math.prod(reference), 2, 12))
    return inputs | {
        "kv_cache_mode": "cached",
        "reference_grid_sizes": torch.tensor([reference]),
        "origin_len": 4 * (reference[0] - 1),
        "origin_area": [16 * grid[1], 16 * grid[2]],
    }


def _animate2_with_masks() -> Any:
    """The model keeps its block masks. It would compile what makes them, which takes longer than all else here."""
    model: Any = from_diffusers("WanAnimate2Transformer3DModel", WAN_ANIMATE2)
    module = _module("transformer_wan_animate_2")

    def eager(*args: Any, **kwargs: Any) -> Any:
        return create(*args, **(kwargs | {"_compile": False}))

    create = module.create_block_mask
    with mock.patch.object(module, "create_block_mask", eager):
        for frames, height, width in GRIDS:
            key = (frames - 1, height * width)
            model.block_masks[key] = model.create_mask(*key, "cpu")
    return model


def _animate2() -> list[Case]:
    sites = numbered("blocks.{}.self_attn")
    return [
        make_case(
            "WanAnimate2",
            lambda: from_diffusers("WanAnimate2Transformer3DModel", WAN_ANIMATE2 | {"use_img_emb": True}),
            _animate2_extract_inputs,
            sites=sites,
            blocks=numbered("blocks.{}"),
            output=_first,
            note="the reference's pass, dense, which fills the cache; rope reads the grid from a tensor",
            fullgraph=False,
            fake=False,
        ),
        make_case(
            "WanAnimate2Cached",
            _animate2_with_masks,
            _animate2_cached_inputs,
            sites=sites,
            blocks=numbered("blocks.{}"),
            output=_first,
            note="the generation's pass: flex_attention over video and cached reference, each padded to 128 tokens",
            kind="mixed",
            mask="blocks",
            fullgraph=False,
            fake=False,
        ),
    ]


# ---------------------------------------------------------------- AnyFlow, autoregressive


def _far_inputs(draw: Draw, grid: Grid, context: int, limit: int) -> dict[str, Any]:
    size = (2 * grid[1], 2 * grid[2])
    frames = context + grid[0]
    half = grid[0] // 2
    partition = [1] * context + [half, half]
    build = _module("transformer_anyflow_far")._build_anyflow_far_causal_block_mask
    return {
        "hidden_states": draw(1, frames, 4, *size),
        "timestep": torch.full((1, frames), 500.0),
        "r_timestep": torch.full((1, frames), 300.0),
        "encoder_hidden_states": draw(1, TEXT, 16),
        "chunk_partition": partition,
        "attention_mask": build(partition, *size, (1, 2, 2), (1, 4, 4), limit, device="cpu"),
    }


def _anyflow_far() -> list[Case]:
    def case(name: str, context: int, note: str) -> Case:
        return make_case(
            name,
            lambda: from_diffusers("AnyFlowFARTransformer3DModel", WAN | {"full_chunk_limit": 2}),
            lambda draw, grid: _far_inputs(draw, grid, context, limit=2),
            sites=numbered("blocks.{}.attn1"),
            blocks=numbered("blocks.{}"),
            note=note,
            mask="blocks",
        )

    return [
        case("AnyFlowFAR", 0, "flex_attention, causal by chunks of frames, padded to 128 tokens and 16 channels"),
        case("AnyFlowFARContext", 1, "the same, with a frame of coarser patches before the video"),
    ]


# ---------------------------------------------------------------- SkyReels V2, diffusion forcing


def _skyreels_inputs(draw: Draw, grid: Grid) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 4, grid[0], 2 * grid[1], 2 * grid[2]),
        "timestep": torch.tensor([[500.0 - 10 * frame for frame in range(grid[0])]]),
        "encoder_hidden_states": draw(1, TEXT, 16),
        "enable_diffusion_forcing": True,
    }


def _skyreels() -> Case:
    return make_case(
        "SkyReelsV2Causal",
        lambda: from_diffusers("SkyReelsV2Transformer3DModel", WAN | {"num_frame_per_block": 2}),
        _skyreels_inputs,
        sites=numbered("blocks.{}.attn1"),
        blocks=numbered("blocks.{}"),
        grids=((4, 5, 8), (4, 6, 9)),  # two blocks of two frames
        note="diffusion forcing: one timestep per frame, causal by blocks of two frames",
        mask="causal",
    )


# ---------------------------------------------------------------- Cosmos

COSMOS: dict[str, Any] = {
    "in_channels": 5,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "mlp_ratio": 2.0,
    "text_embed_dim": 16,
    "adaln_lora_dim": 8,
    "max_size": (8, 32, 32),
    # The padding mask is resized by torchvision, which the test environment does not have.
    "concat_padding_mask": False,
    "extra_pos_embed_type": None,
}


def _cosmos2_inputs(draw: Draw, grid: Grid) -> dict[str, Any]:
    size = (2 * grid[1], 2 * grid[2])
    condition = torch.zeros(1, 1, grid[0], *size)
    condition[:, :, :1] = 1
    return {
        "hidden_states": draw(1, 4, grid[0], *size),
        "timestep": torch.full((1, 1, grid[0], 1, 1), 0.5),
        "encoder_hidden_states": draw(1, TEXT, 16),
        "attention_mask": _mask(),
        "fps": 16,
        "condition_mask": condition,
    }


def _cosmos25_inputs(draw: Draw, grid: Grid) -> dict[str, Any]:
    inputs = _cosmos2_inputs(draw, grid)
    del inputs["attention_mask"]
    return inputs | {
        "encoder_hidden_states": (draw(1, TEXT, 20), draw(1, 5, 14)),
        "block_controlnet_hidden_states": [draw(1, math.prod(grid), 32)],
    }


def _cosmos() -> list[Case]:
    transfer = {
        "use_crossattn_projection": True,
        "crossattn_proj_in_channels": 20,
        "encoder_hidden_states_channels": 16,
        "controlnet_block_every_n": 2,
        "img_context_dim_in": 14,
        "img_context_num_tokens": 5,
        "img_context_dim_out": 32,
    }

    def case(name: str, inputs: Callable[[Draw, Grid], dict[str, Any]], changes: dict[str, Any], note: str) -> Case:
        return make_case(
            name,
            lambda: from_diffusers("CosmosTransformer3DModel", COSMOS | changes),
            inputs,
            sites=numbered("transformer_blocks.{}.attn1"),
            blocks=numbered("transformer_blocks.{}"),
            note=note,
        )

    return [
        case("Cosmos2", _cosmos2_inputs, {}, "one timestep per frame, condition mask, text mask"),
        case("Cosmos25", _cosmos25_inputs, transfer, "cross-attention to text and image, residuals of a control net"),
    ]


# ---------------------------------------------------------------- Cosmos 3


def _cosmos3_inputs(draw: Draw, grid: Grid) -> dict[str, Any]:
    video = math.prod(grid)
    text = torch.arange(TEXT)[None].expand(3, -1)
    positions = torch.cartesian_prod(*(torch.arange(length) for length in grid)).T
    where = torch.arange(TEXT, TEXT + video)
    return {
        "input_ids": (torch.arange(TEXT) * 7) % 40,
        "text_indexes": torch.arange(TEXT),
        "position_ids": torch.cat([text, positions + torch.tensor([[TEXT], [0], [0]])], dim=1),
        "und_len": TEXT,
        "sequence_length": TEXT + video,
        "vision_tokens": [draw(1, 4, grid[0], 2 * grid[1], 2 * grid[2])],
        "vision_token_shapes": [grid],
        "vision_sequence_indexes": where,
        "vision_mse_loss_indexes": where,
        "vision_timesteps": torch.full((video,), 500.0),
        "vision_noisy_frame_indexes": [torch.arange(grid[0])],
    }


def _cosmos3() -> Case:
    config = {
        "head_dim": 12,
        "hidden_size": 40,
        "intermediate_size": 48,
        "latent_channel": 4,
        "patch_latent_dim": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "rope_axes_dim": (2, 2, 2),
        "vocab_size": 40,
    }
    sites = numbered("layers.{}.self_attn")
    return make_case(
        "Cosmos3Omni",
        lambda: from_diffusers("Cosmos3OmniTransformer", config),
        _cosmos3_inputs,
        sites=sites,
        blocks=numbered("layers.{}"),
        projections=linears(sites[0], "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        output=_first,
        note="grouped heads, no batch; a site first attends causally within the text, then the video to text and video",
        kind="mixed",
        text="prefix",
        text_projections=linears(sites[0], out="to_out"),
    )


# ---------------------------------------------------------------- MiniMax H3


def _minimax_inputs(draw: Draw, grid: Grid) -> dict[str, Any]:
    audio = 11
    video = math.prod(grid)
    tags = torch.tensor([1] * TEXT + [2] * audio + [0] * video)
    positions = torch.zeros(TEXT + audio + video, 3)
    positions[:TEXT, 0] = torch.arange(TEXT)
    positions[TEXT : TEXT + audio, 0] = TEXT + torch.arange(audio) / 4
    positions[TEXT + audio :] = torch.cartesian_prod(*(torch.arange(length) for length in grid))
    positions[TEXT + audio :, 0] += TEXT
    rows = torch.arange(len(tags))
    return {
        "hidden_states": draw(1, video, 16),
        "audio_hidden_states": draw(1, audio, 6),
        "encoder_hidden_states": draw(1, TEXT, 16),
        "timestep": torch.tensor([0.0, 0.5]),
        "timestep_indices": (tags != 1).long(),
        "token_tags": tags,
        "position_ids": positions,
        "video_indices": rows[tags == 0],
        "audio_indices": rows[tags == 2],
        "text_indices": rows[tags == 1],
    }


def _minimax_grid(arguments: Mapping[str, Any]) -> Grid:
    """No argument of forward shows it but the number of tokens, which the two grids of the zoo have apart."""
    tokens = arguments["hidden_states"].shape[1]
    return next(grid for grid in GRIDS if math.prod(grid) == tokens)


def _minimax() -> Case:
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 24,
        "hidden_size": 40,
        "num_layers": 2,
        "num_refiner_layers": 1,
        "ffn_dim": 48,
        "in_channels": 4,
        "audio_in_channels": 6,
        "text_dim": 16,
        "freq_dim": 32,
        "time_embed_hidden_dim": 32,
        "time_embed_dim": 24,
        "rope_freq_dim": 3,
    }
    return make_case(
        "MiniMaxH3",
        lambda: from_diffusers("MiniMaxH3Transformer3DModel", config),
        _minimax_inputs,
        sites=numbered("transformer_blocks.{}.attn"),
        blocks=numbered("transformer_blocks.{}"),
        output=_audio_and_video,
        note="text, audio and video rows put into one sequence by index tensors; needs grid=",
        kind="joint",
        text="before",
        grid=_minimax_grid,
    )


# ---------------------------------------------------------------- Sana


def _sana_video_inputs(draw: Draw, grid: Grid) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 4, grid[0], 2 * grid[1], 2 * grid[2]),
        "encoder_hidden_states": draw(1, TEXT, 16),
        "timestep": torch.tensor([500.0]),
        "encoder_attention_mask": _mask().float(),
    }


def _sana_video() -> Case:
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 2,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 12,
        "cross_attention_dim": 24,
        "caption_channels": 16,
        "rope_max_seq_len": 32,
    }
    return make_case(
        "SanaVideo",
        lambda: from_diffusers("SanaVideoTransformer3DModel", config),
        _sana_video_inputs,
        sites=(),
        blocks=numbered("transformer_blocks.{}"),
        note="linear self-attention already: no site",
    )


def _sana_wm_inputs(draw: Draw, grid: Grid) -> dict[str, Any]:
    # A camera that looks straight ahead and moves sideways: camera to world (4 x 4), then focal lengths and centre.
    pose = torch.eye(4).repeat(grid[0], 1, 1)
    pose[:, 0, 3] = torch.arange(grid[0]) / 10
    lens = torch.tensor([10.0, 10.0, grid[2] / 2, grid[1] / 2]).expand(grid[0], -1)
    return {
        "hidden_states": draw(1, 4, *grid),
        "timestep": torch.full((1, 1, grid[0]), 500.0),
        "encoder_hidden_states": draw(1, 1, TEXT, 16),
        "encoder_attention_mask": _mask().float(),
        "camera_conditions": torch.cat([pose.flatten(1), lens], dim=1)[None],
        "chunk_plucker": draw(1, 6, *grid),
    }


def _sana_wm() -> Case:
    config = {
        "in_channels": 4,
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "softmax_every_n": 2,
        "linear_head_dim": 16,
        "chunk_plucker_channels": 6,
        "caption_channels": 16,
        "mlp_ratio": 2.0,
    }
    return make_case(
        "SanaWM",
        lambda: from_diffusers("SanaWMTransformer3DModel", config),
        _sana_wm_inputs,
        # The same block attends twice: with its fused qkv, and with the camera's projections.
        sites=("blocks.1.attn", "blocks.1.attn"),
        blocks=numbered("blocks.{}"),
        projections=linears("blocks.1.attn", "qkv", "qkv", "qkv", "proj"),
        note="every second block is a gated delta net; attention rounds to bf16, and the camera's pads its heads",
    )


# ---------------------------------------------------------------- Sana's refiner

REFINER: dict[str, Any] = {
    "in_channels": 8,
    "out_channels": 8,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "cross_attention_dim": 32,
    "audio_in_channels": 6,
    "audio_out_channels": 6,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": 16,
    "num_layers": 2,
    "caption_channels": 16,
}


def _refiner() -> Any:
    return from_diffusers("SanaWMLTX2RefinerTransformer3DModel", REFINER)


@functools.cache
def _refiner_rope(frames: tuple[int, ...], height: int, width: int) -> tuple[Tensor, Tensor]:
    with torch.random.fork_rng(devices=[]):
        model = _refiner()
    rope: tuple[Tensor, Tensor] = model.build_rotary_emb_for_absolute_positions(
        1, list(frames), height, width, torch.device("cpu"), 24.0
    )
    return rope


def _refiner_inputs(draw: Draw, grid: Grid) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, math.prod(grid), 8),
        "encoder_hidden_states": draw(1, TEXT, 16),
        "timestep": torch.full((1, math.prod(grid)), 500.0),
        "video_rotary_emb": _refiner_rope(tuple(range(3, 3 + grid[0])), *grid[1:]),
        "encoder_attention_mask": _mask().float(),
    }


def _refiner_cached_inputs(draw: Draw, grid: Grid) -> dict[str, Any]:
    frame = grid[1] * grid[2]
    cache = _module("transformer_sana_wm_refiner").SanaWMRefinerKVCache(2)
    cache.sink_pe = _refiner_rope((0,), *grid[1:])
    for layer in cache.layer_caches:
        layer.store_sink(draw(1, frame, 32), draw(1, frame, 32))
        layer.store_history(draw(1, 2 * frame, 32), draw(1, 2 * frame, 32))
    return _refiner_inputs(draw, grid) | {"kv_cache": cache, "kv_cache_mode": "inject"}


def _refiners() -> list[Case]:
    def case(name: str, inputs: Callable[[Draw, Grid], dict[str, Any]], note: str, kind: str) -> Case:
        return make_case(
            name,
            _refiner,
            inputs,
            sites=numbered("transformer_blocks.{}.attn1"),
            blocks=numbered("transformer_blocks.{}"),
            note=note,
            kind=kind,
            text="prefix" if kind == "mixed" else "none",
        )

    return [
        case("SanaWMRefiner", _refiner_inputs, "packed tokens, rope from outside: no argument tells the grid", "self"),
        case("SanaWMRefinerCached", _refiner_cached_inputs, "keys of three earlier frames from a cache", "mixed"),
    ]


# ---------------------------------------------------------------- Kandinsky


def _nabla_inputs(draw: Draw, grid: Grid) -> dict[str, Any]:
    tiles = torch.cartesian_prod(*(torch.arange(n) for n in (grid[0], grid[1] // 8, grid[2] // 8)))
    near = ((tiles[:, None] - tiles).abs().sum(-1) == 0)[None, None]
    return {
        "hidden_states": draw(1, grid[0], 2 * grid[1], 2 * grid[2], 4),
        "encoder_hidden_states": draw(1, TEXT, 16),
        "timestep": torch.tensor([500.0]),
        "pooled_projections": draw(1, 12),
        "visual_rope_pos": tuple(torch.arange(length) for length in grid),
        "text_rope_pos": torch.arange(TEXT),
        "sparse_params": {"sta_mask": near, "to_fractal": True, "P": 0.5},
    }


def _nabla() -> Case:
    config = {
        "in_visual_dim": 4,
        "out_visual_dim": 4,
        "in_text_dim": 16,
        "in_text_dim2": 12,
        "time_dim": 16,
        "model_dim": 32,
        "ff_dim": 48,
        "num_text_blocks": 2,
        "num_visual_blocks": 2,
        "axes_dims": (4, 6, 6),
        "attention_type": "nabla",
    }

    def make() -> nn.Module:
        # As `set_attention_backend("flex")` does, which would also make flex_attention everybody's default.
        model = from_diffusers("Kandinsky5Transformer3DModel", config)
        flex = importlib.import_module("diffusers.models.attention_dispatch").AttentionBackendName.FLEX
        for module in model.modules():
            if (processor := getattr(module, "processor", None)) is not None:
                processor._attention_backend = flex
        return model

    sites = numbered("visual_transformer_blocks.{}.self_attention")
    return make_case(
        "Kandinsky5Nabla",
        make,
        _nabla_inputs,
        sites=sites,
        blocks=numbered("visual_transformer_blocks.{}"),
        projections=linears(sites[0], "to_query", "to_key", "to_value", "out_layer"),
        grids=TILES,
        note="flex_attention everywhere; the sites in tiles of 8x8 tokens, with a block mask made from query and key",
        mask="blocks",
    )


def _kandinsky6_inputs(draw: Draw, grid: Grid) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, grid[0], 2 * grid[1], 2 * grid[2], 9),
        "encoder_hidden_states": draw(1, TEXT, 16),
        "pooled_projections": draw(1, 12),
        "timestep": torch.tensor([500.0]),
        "audio_hidden_states": draw(1, 23 + grid[0], 6),
        "encoder_attention_mask": _mask(),
    }


def _kandinsky6() -> Case:
    config = {
        "in_visual_dim": 4,
        "out_visual_dim": 4,
        "in_text_dim": 16,
        "in_text_dim2": 12,
        "time_dim": 16,
        "model_dim": 24,
        "ff_dim": 48,
        "num_text_blocks": 1,
        "num_visual_blocks": 2,
        "axes_dims": (4, 4, 4),
        "in_audio_dim": 6,
        "out_audio_dim": 6,
        "model_dim_a": 36,
        "time_dim_a": 16,
        "ff_dim_a": 40,
        "text_token_padding": True,
        "ca_rope": True,
        "cross_gates": True,
        "fix_modulation": True,
    }
    sites = numbered("visual_transformer_blocks.{}.video_dec_block.self_attention")
    return make_case(
        "Kandinsky6",
        lambda: from_diffusers("Kandinsky6Transformer3DModel", config),
        _kandinsky6_inputs,
        sites=sites,
        blocks=numbered("visual_transformer_blocks.{}"),
        projections=linears(sites[0], "to_query", "to_key", "to_value", "out_layer"),
        output=_audio_and_video,
        note="video and audio, channels last; self-attention of audio and of text is not a site",
    )


def _kandinsky6_sr_inputs(draw: Draw, grid: Grid) -> dict[str, Any]:
    return {"hidden_states": draw(1, *grid, 9), "timestep": torch.tensor([500.0])}


def _kandinsky6_sr() -> Case:
    config = {
        "in_visual_dim": 4,
        "out_visual_dim": 4,
        "time_dim": 16,
        "model_dim": 32,
        "ff_dim": 48,
        "num_visual_blocks": 2,
        "axes_dims": (4, 6, 6),
        "nabla_threshold": 0.5,
        "nabla_window": (1, 1, 1),
    }
    sites = numbered("visual_transformer_blocks.{}.self_attention")
    return make_case(
        "Kandinsky6SR",
        lambda: from_diffusers("Kandinsky6SRTransformer3DModel", config),
        _kandinsky6_sr_inputs,
        sites=sites,
        blocks=numbered("visual_transformer_blocks.{}"),
        projections=linears(sites[0], "to_query", "to_key", "to_value", "out_layer"),
        grids=TILES,
        note="flex_attention in tiles of 8x8 tokens, with a block mask made from query and key; no text",
        mask="blocks",
    )


SPECIAL_CASES: dict[str, Case] = {
    case.name: case
    for case in [
        *_animate2(),
        *_anyflow_far(),
        _skyreels(),
        *_cosmos(),
        _cosmos3(),
        _minimax(),
        _sana_video(),
        _sana_wm(),
        *_refiners(),
        _nabla(),
        _kandinsky6(),
        _kandinsky6_sr(),
    ]
}
