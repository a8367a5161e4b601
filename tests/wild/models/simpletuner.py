"""simpletuner: its own copies of classes of diffusers, and HunyuanVideo 1.5 as Tencent wrote it."""

from __future__ import annotations

from tests.models.zoo import WAN
from tests.wild.case import Wild
from tests.wild.models.copies import copy_of, made
from tests.wild.models.hyvideo import SCORES, inputs, model

MODELS = "simpletuner.helpers.models"

KANDINSKY = {
    "in_visual_dim": 4,
    "out_visual_dim": 4,
    "in_text_dim": 16,
    "in_text_dim2": 12,
    "time_dim": 16,
    "model_dim": 24,
    "ff_dim": 48,
    "num_text_blocks": 2,
    "num_visual_blocks": 2,
    "axes_dims": (4, 4, 4),
}
LTX = {
    "in_channels": 8,
    "out_channels": 8,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "cross_attention_dim": 32,
    "num_layers": 2,
    "caption_channels": 16,
}
SANA = {
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

ENTRIES: dict[str, Wild] = {
    f"{MODELS}.hunyuanvideo.transformer.HunyuanVideo_1_5_DiffusionTransformer": Wild(
        model(f"{MODELS}.hunyuanvideo.transformer", f"{MODELS}.hunyuanvideo.commons.parallel_states"),
        inputs,
        refused=SCORES,
    ),
    f"{MODELS}.kandinsky5_video.transformer_kandinsky5.Kandinsky5Transformer3DModel": copy_of(
        "Kandinsky5",
        made(f"{MODELS}.kandinsky5_video.transformer_kandinsky5", "Kandinsky5Transformer3DModel", KANDINSKY),
    ),
    f"{MODELS}.ltxvideo.transformer.LTXVideoTransformer3DModel": copy_of(
        "LTXVideo", made(f"{MODELS}.ltxvideo.transformer", "LTXVideoTransformer3DModel", LTX)
    ),
    f"{MODELS}.sanavideo.transformer.SanaVideoTransformer3DModel": copy_of(
        "SanaVideo",
        made(f"{MODELS}.sanavideo.transformer", "SanaVideoTransformer3DModel", SANA),
        refused="cross-attention stays dense",
    ),
    f"{MODELS}.wan.transformer.WanTransformer3DModel": copy_of(
        "Wan", made(f"{MODELS}.wan.transformer", "WanTransformer3DModel", WAN), fullgraph=False, breaks_inside=True
    ),
}

_VAE = "a part of a decoder of latents: convolutions"
WITHOUT_ENTRY: dict[str, str] = {
    f"{MODELS}.ltxvideo.autoencoder.{name}": _VAE
    for name in (
        "LTXVideoDownBlock3D",
        "LTXVideo095DownBlock3D",
        "LTXVideoMidBlock3d",
        "LTXVideoUpBlock3d",
        "LTXVideoDecoder3d",
    )
}
