"""Tiny video DiTs whose self-attention runs over video and text in one sequence: every such class of diffusers.

As in `zoo.py`, every site sees 154 or 216 video tokens. To these come the text tokens, before or after the video: 17 of
the prompt, in HunyuanVideo15 and Framepack also those of images or of a second prompt. Masks really pad.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.models.zoo import TEXT, Case, Draw, Grid, from_diffusers, linears, make_case, numbered

VALID = 13  # text tokens that are no padding


def _mask(*valid: int, length: int = TEXT) -> Tensor:
    """float (B, length): 1 at the first ``valid`` tokens of each sample."""
    return (torch.arange(length) < torch.tensor(valid)[:, None]).float()


def _text_linears(owner: str, out: str = "to_add_out") -> dict[str, str]:
    return linears(owner, "add_q_proj", "add_k_proj", "add_v_proj", out)


# ---------------------------------------------------------------- CogVideoX and ConsisID

COGVIDEOX: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 24,
    "text_embed_dim": 16,
    "num_layers": 2,
    "sample_width": 22,
    "sample_height": 14,
    "sample_frames": 5,
    "max_text_seq_length": TEXT,
}


def _cogvideox_inputs(draw: Draw, grid: Grid) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, grid[0], 4, 2 * grid[1], 2 * grid[2]),  # frames before channels
        "encoder_hidden_states": draw(1, TEXT, 16),
        "timestep": torch.tensor([500]),
    }


def _rope(grid: Grid) -> tuple[Tensor, Tensor]:
    embeddings = importlib.import_module("diffusers.models.embeddings")
    cos, sin = embeddings.get_3d_rotary_pos_embed(
        embed_dim=16, crops_coords=((0, 0), grid[1:]), grid_size=grid[1:], temporal_size=grid[0]
    )
    return cos, sin


def _cogvideox_rope_inputs(draw: Draw, grid: Grid) -> dict[str, Any]:
    return _cogvideox_inputs(draw, grid) | {"image_rotary_emb": _rope(grid)}


def _cogvideox15_inputs(draw: Draw, grid: Grid) -> dict[str, Any]:
    return _cogvideox_inputs(draw, (2 * grid[0], *grid[1:])) | {
        "image_rotary_emb": _rope(grid),
        "ofs": torch.tensor([2.0]),
    }


def _consisid_inputs(draw: Draw, grid: Grid) -> dict[str, Any]:
    return _cogvideox_rope_inputs(draw, grid) | {
        "id_cond": draw(1, 10),
        "id_vit_hidden": [draw(1, 7, 12) for _ in range(2)],
    }


def _cogvideox_family() -> list[Case]:
    def case(
        name: str,
        inputs: Callable[[Draw, Grid], dict[str, Any]],
        *,
        of: str = "CogVideoX",
        note: str = "",
        **changes: Any,
    ) -> Case:
        return make_case(
            name,
            lambda: from_diffusers(f"{of}Transformer3DModel", COGVIDEOX | changes),
            inputs,
            sites=numbered("transformer_blocks.{}.attn1"),
            blocks=numbered("transformer_blocks.{}"),
            note=note,
            kind="joint",
            text="before",
        )

    return [
        case("CogVideoX", _cogvideox_inputs, note="1.0-2B: absolute positions, none between Linear and attention"),
        case("CogVideoXRope", _cogvideox_rope_inputs, use_rotary_positional_embeddings=True, note="1.0-5B: rope"),
        case(
            "CogVideoX15",
            _cogvideox15_inputs,
            use_rotary_positional_embeddings=True,
            patch_size_t=2,
            ofs_embed_dim=24,
            note="1.5: two latent frames per token, patches by a Linear",
        ),
        case(
            "ConsisID",
            _consisid_inputs,
            of="ConsisID",
            num_attention_heads=3,
            use_rotary_positional_embeddings=True,
            is_train_face=True,
            cross_attn_interval=1,
            cross_attn_dim_head=8,
            cross_attn_num_heads=2,
            LFE_id_dim=10,
            LFE_vit_dim=12,
            LFE_depth=2,
            LFE_dim_head=4,
            LFE_num_heads=2,
            LFE_num_id_token=3,
            LFE_num_querie=6,
            LFE_output_dim=32,  # two thirds of the width
            LFE_ff_mult=2,
            LFE_num_scale=2,
            note="the face's perceivers write softmax(q @ k.T) @ v out: no attention calls",
        ),
    ]


# ---------------------------------------------------------------- HunyuanVideo

HUNYUAN: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "mlp_ratio": 2.0,
    "text_embed_dim": 16,
    "pooled_projection_dim": 10,
    "rope_axes_dim": (4, 4, 4),
}
DUAL_THEN_SINGLE = (*numbered("transformer_blocks.{}"), *numbered("single_transformer_blocks.{}"))


def _hunyuan_inputs(draw: Draw, grid: Grid, valid: tuple[int, ...] = (VALID,)) -> dict[str, Any]:
    batch = len(valid)
    return {
        "hidden_states": draw(batch, 4, grid[0], 2 * grid[1], 2 * grid[2]),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": draw(batch, TEXT, 16),
        "encoder_attention_mask": _mask(*valid),
        "pooled_projections": draw(batch, 10),
    }


def _guided_hunyuan_inputs(draw: Draw, grid: Grid) -> dict[str, Any]:
    return _hunyuan_inputs(draw, grid) | {"guidance": torch.tensor([6000.0])}


def _pair_of_hunyuan_inputs(draw: Draw, grid: Grid) -> dict[str, Any]:
    return _hunyuan_inputs(draw, grid, (VALID, 5))


def _framepack_inputs(draw: Draw, grid: Grid) -> dict[str, Any]:
    size = (2 * grid[1], 2 * grid[2])
    indices = torch.arange(7 + grid[0])
    return _guided_hunyuan_inputs(draw, grid) | {
        "image_embeds": draw(1, 5, 14),
        "indices_latents": indices[7:],
        "latents_clean": draw(1, 4, 1, *size),
        "indices_latents_clean": indices[6:7],
        "latents_history_2x": draw(1, 4, 2, *size),
        "indices_latents_history_2x": indices[4:6],
        "latents_history_4x": draw(1, 4, 4, *size),
        "indices_latents_history_4x": indices[:4],
    }


def _hunyuan_family() -> list[Case]:
    def case(
        name: str,
        inputs: Callable[[Draw, Grid], dict[str, Any]],
        config: dict[str, Any],
        *,
        of: str = "HunyuanVideo",
        note: str,
        **more: Any,
    ) -> Case:
        sites = tuple(f"{block}.attn" for block in DUAL_THEN_SINGLE)
        return make_case(
            name,
            lambda: from_diffusers(f"{of}Transformer3DModel", HUNYUAN | config),
            inputs,
            sites=sites,
            blocks=DUAL_THEN_SINGLE,
            note=note,
            kind="joint",
            text="after",
            text_projections=_text_linears(sites[0]),
            **more,
        )

    return [
        case(
            "HunyuanVideo",
            _guided_hunyuan_inputs,
            {"guidance_embeds": True},
            note="T2V; two dual-stream blocks, then two of one stream without an out Linear",
            mask="keys",
        ),
        case(
            "HunyuanVideoI2V",
            _pair_of_hunyuan_inputs,
            {"guidance_embeds": False, "image_condition_type": "latent_concat"},
            note="two samples that pad differently",
            mask="keys",
        ),
        case(
            "HunyuanVideoTokenReplace",
            _guided_hunyuan_inputs,
            {"guidance_embeds": True, "image_condition_type": "token_replace"},
            note="the first frame's tokens are modulated by themselves",
            mask="keys",
        ),
        case(
            "HunyuanVideoFramepack",
            _framepack_inputs,
            {"guidance_embeds": True, "has_image_proj": True, "image_proj_dim": 14, "has_clean_x_embedder": True},
            of="HunyuanVideoFramepack",
            note="history at three resolutions before the video; the text is cut to its valid tokens, so no mask",
            fake=False,
        ),
    ]


# ---------------------------------------------------------------- HunyuanVideo 1.5


def _hunyuan15_inputs(draw: Draw, grid: Grid) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 9, *grid),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": draw(1, TEXT, 16),
        "encoder_attention_mask": _mask(VALID),
        "encoder_hidden_states_2": draw(1, 6, 8),
        "encoder_attention_mask_2": _mask(4, length=6),
        "image_embeds": torch.zeros(1, 5, 14),
    }


def _hunyuan15_i2v_inputs(draw: Draw, grid: Grid) -> dict[str, Any]:
    return _hunyuan15_inputs(draw, grid) | {"image_embeds": draw(1, 5, 14)}


def _hunyuan15() -> list[Case]:
    config = {
        "in_channels": 9,  # latent, condition and mask
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
    }

    def case(name: str, inputs: Callable[[Draw, Grid], dict[str, Any]], task: str, note: str) -> Case:
        sites = numbered("transformer_blocks.{}.attn")
        return make_case(
            name,
            lambda: from_diffusers("HunyuanVideo15Transformer3DModel", config | {"task_type": task}),
            inputs,
            sites=sites,
            blocks=numbered("transformer_blocks.{}"),
            note=note,
            kind="joint",
            text="after",
            text_projections=_text_linears(sites[0]),
            mask="padding",
            fullgraph=False,
            fake=False,
        )

    return [
        case("HunyuanVideo15", _hunyuan15_inputs, "t2v", "T2V: the image's tokens are padding"),
        case("HunyuanVideo15I2V", _hunyuan15_i2v_inputs, "i2v", "I2V: valid image tokens come first in the text"),
    ]


# ---------------------------------------------------------------- EasyAnimate


def _easyanimate_inputs(draw: Draw, grid: Grid) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 4, grid[0], 2 * grid[1], 2 * grid[2]),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": draw(1, TEXT, 16),
    }


def _easyanimate() -> Case:
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "patch_size": 2,
        "sample_width": 22,
        "sample_height": 14,
        "num_layers": 3,
        "mmdit_layers": 2,
        "time_embed_dim": 24,
        "text_embed_dim": 16,
    }
    sites = numbered("transformer_blocks.{}.attn1", 3)
    return make_case(
        "EasyAnimate",
        lambda: from_diffusers("EasyAnimateTransformer3DModel", config),
        _easyanimate_inputs,
        sites=sites,
        blocks=numbered("transformer_blocks.{}", 3),
        note="two dual-stream blocks, then one of one stream",
        kind="joint",
        text="before",
        text_projections=_text_linears(sites[0]),
    )


# ---------------------------------------------------------------- MotifVideo


def _motif_inputs(draw: Draw, grid: Grid) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 9, grid[0], 2 * grid[1], 2 * grid[2]),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": draw(1, TEXT, 16),
        "encoder_attention_mask": _mask(VALID).bool(),
    }


def _motif_image_inputs(draw: Draw, grid: Grid) -> dict[str, Any]:
    return _motif_inputs(draw, grid) | {"image_embeds": draw(1, 5, 14)}


def _motif() -> list[Case]:
    config: dict[str, Any] = {
        "in_channels": 9,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 2,
        "num_single_layers": 2,
        "mlp_ratio": 2.0,
        "text_embed_dim": 16,
        "rope_axes_dim": (4, 4, 4),
    }
    decoder: dict[str, Any] = {
        "num_decoder_layers": 1,
        "image_embed_dim": 14,
        "enable_text_cross_attention_dual": True,
        "enable_text_cross_attention_single": True,
    }

    def case(name: str, inputs: Callable[[Draw, Grid], dict[str, Any]], changes: dict[str, Any], note: str) -> Case:
        sites = tuple(f"{block}.attn" for block in DUAL_THEN_SINGLE)
        return make_case(
            name,
            lambda: from_diffusers("MotifVideoTransformer3DModel", config | changes),
            inputs,
            sites=sites,
            blocks=DUAL_THEN_SINGLE,
            note=note,
            kind="joint",
            text="after",
            mask="keys",
            text_projections=_text_linears(sites[0]),
        )

    return [
        case("MotifVideo", _motif_inputs, {}, "the same blocks as HunyuanVideo"),
        case(
            "MotifVideoDecoder",
            _motif_image_inputs,
            decoder,
            "text cross-attention beside the joint one; in the last block the encoder's video takes the text's place",
        ),
    ]


# ---------------------------------------------------------------- Mochi


def _mochi_inputs(draw: Draw, grid: Grid) -> dict[str, Any]:
    return {
        "hidden_states": draw(2, 4, grid[0], 2 * grid[1], 2 * grid[2]),
        "encoder_hidden_states": draw(2, TEXT, 16),
        "timestep": torch.tensor([500, 500]),
        "encoder_attention_mask": _mask(VALID, 5).bool(),
    }


def _mochi() -> Case:
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 2,
        "pooled_projection_dim": 20,
        "in_channels": 4,
        "text_embed_dim": 16,
        "time_embed_dim": 24,
        "max_sequence_length": TEXT,
    }
    sites = numbered("transformer_blocks.{}.attn1")
    return make_case(
        "Mochi",
        lambda: from_diffusers("MochiTransformer3DModel", config),
        _mochi_inputs,
        sites=sites,
        blocks=numbered("transformer_blocks.{}"),
        note="one attention call per sample, over the video and that sample's valid text",
        kind="joint",
        text="after",
        text_projections=_text_linears(sites[0]),
        calls=2,
        fake=False,
    )


JOINT_CASES: dict[str, Case] = {
    case.name: case
    for case in [*_cogvideox_family(), *_hunyuan_family(), *_hunyuan15(), _easyanimate(), *_motif(), _mochi()]
}
