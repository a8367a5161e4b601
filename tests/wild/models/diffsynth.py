"""diffsynth: its own copies of Wan, LTX-2, LongCat, LingBot, MiniMax-H3 and others."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

from tests.wild.case import GRID, TEXT, Wild, draw, numbered

MODELS = "diffsynth.models"
FRAMES, HEIGHT, WIDTH = GRID


def make(file: str, name: str, **config: Any) -> nn.Module:
    model: nn.Module = getattr(importlib.import_module(f"{MODELS}.{file}"), name)(**config)
    return model


class Pipeline(nn.Module):
    """A denoiser as diffsynth's pipeline runs it: a function goes through its parts, and never calls its forward."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.dit = denoiser
        self.step = importlib.import_module("diffsynth.pipelines.wan_video").model_fn_wan_video

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.step(self.dit, latents=latents, timestep=timestep, context=context)
        return output


def wan() -> nn.Module:
    denoiser = make(
        "wan_video_dit",
        "WanModel",
        dim=48,
        in_dim=4,
        ffn_dim=64,
        out_dim=4,
        text_dim=20,
        freq_dim=16,
        eps=1e-6,
        patch_size=(1, 2, 2),
        num_heads=4,
        num_layers=2,
        has_image_input=False,
    )
    return Pipeline(denoiser)


def wan_inputs() -> dict[str, Any]:
    return {
        "latents": draw(1, 4, FRAMES, 2 * HEIGHT, 2 * WIDTH),
        "timestep": torch.tensor([500.0]),
        "context": draw(1, TEXT, 20),
    }


def wan_s2v() -> nn.Module:
    return make(
        "wan_video_dit_s2v",
        "WanS2VModel",
        dim=48,
        in_dim=16,
        ffn_dim=64,
        out_dim=16,
        text_dim=20,
        freq_dim=16,
        eps=1e-6,
        patch_size=(1, 2, 2),
        num_heads=4,
        num_layers=2,
        cond_dim=16,
        audio_dim=12,
        num_audio_token=4,
        audio_inject_layers=[0],
    )


def wan_s2v_inputs() -> dict[str, Any]:
    return {
        "latents": draw(1, 16, FRAMES + 1, 2 * HEIGHT, 2 * WIDTH),
        "timestep": torch.tensor([500.0]),
        "context": draw(1, TEXT, 20),
        "audio_input": draw(1, 25, 12, 4 * FRAMES),
        "motion_latents": draw(1, 16, 19, 2 * HEIGHT, 2 * WIDTH),
        "pose_cond": draw(1, 16, FRAMES, 2 * HEIGHT, 2 * WIDTH, seed=3),
    }


def longcat() -> nn.Module:
    return make(
        "longcat_video_dit",
        "LongCatVideoTransformer3DModel",
        in_channels=4,
        out_channels=4,
        hidden_size=48,
        depth=2,
        num_heads=3,
        caption_channels=20,
        adaln_tembed_dim=16,
        frequency_embedding_size=16,
        enable_flashattn2=False,
    )


def denoiser_inputs() -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 4, FRAMES, 2 * HEIGHT, 2 * WIDTH),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": draw(1, TEXT, 20),
    }


def longcat_inputs() -> dict[str, Any]:
    inputs = denoiser_inputs()
    return {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"][:, None]}


def lingbot() -> nn.Module:
    return make(
        "lingbot_video_dit",
        "LingBotVideoDiT",
        in_channels=4,
        out_channels=4,
        hidden_size=48,
        num_attention_heads=4,
        depth=2,
        intermediate_size=64,
        text_dim=20,
        freq_dim=16,
        axes_dims=(4, 4, 4),
        axes_lens=(64, 64, 64),
    )


def mini_train_dit() -> nn.Module:
    return make(
        "anima_dit",
        "MiniTrainDIT",
        max_img_h=240,
        max_img_w=240,
        max_frames=128,
        in_channels=4,
        out_channels=4,
        patch_spatial=2,
        patch_temporal=1,
        concat_padding_mask=False,
        model_channels=48,
        num_blocks=2,
        num_heads=4,
        crossattn_emb_channels=20,
        pos_emb_cls="rope3d",
        pos_emb_learnable=False,
        use_adaln_lora=True,
        adaln_lora_dim=8,
        operations=nn,
    )


def mini_train_inputs() -> dict[str, Any]:
    inputs = wan_inputs()
    return {"x": inputs["latents"], "timesteps": torch.tensor([[0.5]]), "context": inputs["context"]}


def ltx() -> nn.Module:
    types = importlib.import_module(f"{MODELS}.ltx2_dit").LTXModelType
    return make(
        "ltx2_dit",
        "LTXModel",
        model_type=types.AudioVideo,
        num_attention_heads=4,
        attention_head_dim=12,
        in_channels=8,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=48,
        caption_channels=20,
        audio_num_attention_heads=4,
        audio_attention_head_dim=8,
        audio_in_channels=8,
        audio_out_channels=8,
        audio_cross_attention_dim=32,
    )


def positions(*sizes: int) -> torch.Tensor:
    """(1, axes, tokens, 2): start and end of every token along every axis."""
    axes = torch.meshgrid(*(torch.arange(size, dtype=torch.float32) for size in sizes), indexing="ij")
    starts = torch.stack([axis.flatten() for axis in axes])[None]
    return torch.stack([starts, starts + 1], dim=-1)


def ltx_inputs() -> dict[str, Any]:
    tokens, sound = FRAMES * HEIGHT * WIDTH, 23
    return {
        "video_latents": draw(1, tokens, 8),
        "video_positions": positions(*GRID),
        "video_context": draw(1, TEXT, 20),
        "video_timesteps": torch.full((1, tokens, 1), 0.5),
        "audio_latents": draw(1, sound, 8),
        "audio_positions": positions(sound),
        "audio_context": draw(1, TEXT, 20, seed=1),
        "audio_timesteps": torch.full((1, sound, 1), 0.5),
        "sigma": torch.tensor([0.5]),
    }


ENTRIES = {
    f"{MODELS}.wan_video_dit.WanModel": Wild(
        wan, wan_inputs, numbered("dit.blocks.{}.self_attn"), blocks=numbered("dit.blocks.{}")
    ),
    f"{MODELS}.wan_video_dit_s2v.WanS2VModel": Wild(
        wan_s2v,
        wan_s2v_inputs,
        numbered("blocks.{}.self_attn"),
        blocks=numbered("blocks.{}"),
        grid=(3, 7, 11),
        fullgraph=False,
    ),
    f"{MODELS}.longcat_video_dit.LongCatVideoTransformer3DModel": Wild(
        longcat, longcat_inputs, numbered("blocks.{}.attn"), blocks=numbered("blocks.{}")
    ),
    f"{MODELS}.lingbot_video_dit.LingBotVideoDiT": Wild(
        lingbot,
        denoiser_inputs,
        numbered("blocks.{}.attn"),
        blocks=numbered("blocks.{}"),
        fullgraph=False,  # its rope looks at values
    ),
    f"{MODELS}.anima_dit.MiniTrainDIT": Wild(
        mini_train_dit,
        mini_train_inputs,
        numbered("blocks.{}.self_attn"),
        blocks=numbered("blocks.{}"),
    ),
    f"{MODELS}.ltx2_dit.LTXModel": Wild(
        ltx,
        ltx_inputs,
        numbered("transformer_blocks.{}.attn1"),
        blocks=numbered("transformer_blocks.{}"),
        grid=None,
        flat="no argument of forward shows the grid",
    ),
}

NOT_YET = "not tried yet: needs the packed sequence of text, sound and video that its pipeline makes"

WITHOUT_ENTRY = {
    f"{MODELS}.ltx2_video_vae.LTX2VideoDecoder": "a decoder of latents: convolutions",
    f"{MODELS}.ltx25_diffusion_video_vae.DiffusionVideoDecoder": "a decoder of latents: convolutions",
    f"{MODELS}.ltx25_diffusion_video_vae.LTX25DiffusionVideoDecoder": "a decoder of latents: convolutions",
    f"{MODELS}.joyai_image_dit.JoyAIImageDiT": "makes images",
    f"{MODELS}.moss_image_dit.MOSSImageDiT": "makes images",
    f"{MODELS}.mova_audio_dit.MovaAudioDit": "makes sound: its tokens are one-dimensional",
    f"{MODELS}.anima_dit.AnimaDiT": "MiniTrainDIT in one fixed size",
    f"{MODELS}.wan_video_mot.MotWanModel": "blocks that run inside those of a WanModel, not a root",
    f"{MODELS}.minimax_h3_dit.MiniMaxH3DiT": NOT_YET,
    f"{MODELS}.minimax_h3_dit_comfy.MiniMaxH3DiTComfy": NOT_YET,
    f"{MODELS}.minimax_h3_dit_comfy.MiniMaxH3DiTComfyPruned": NOT_YET,
}
