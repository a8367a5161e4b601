"""A Wan 2.1 pipeline of diffusers' and transformers' own classes, a few megabytes large, with random weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WORDS = [
    "a",
    "man",
    "people",
    "rabbit",
    "car",
    "bikes",
    "big",
    "green",
    "moving",
    "street",
    "talks",
    "ride",
    "in",
    "the",
]
TEXT_WIDTH = 32


def save_pipeline(folder: Path, videos: Sequence[Tensor], layers: int = 2) -> None:
    """Write the pipeline as `save_pretrained` does; always the same weights.

    videos: (F, 3, H, W) uint8; the latents of these have mean 0 and standard deviation 1, as those of a real VAE have.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = WanPipeline(
            tokenizer=_tokenizer(),
            text_encoder=_text_encoder(),
            vae=_vae(videos),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            transformer=_transformer(layers),
        )
    pipe.save_pretrained(folder)


def _tokenizer() -> Any:
    from transformers import T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces = [(f"▁{word}", -1.0) for word in WORDS] + [(letter, -5.0) for letter in "abcdefghijklmnopqrstuvwxyz,"]
    return T5Tokenizer(vocab=[*special, *pieces, ("▁", -6.0)], extra_ids=0)


def _text_encoder() -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    size = {"d_model": TEXT_WIDTH, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    return UMT5EncoderModel(UMT5Config(vocab_size=len(_tokenizer()), decoder_start_token_id=0, **size)).eval()


def _vae(videos: Sequence[Tensor]) -> Any:
    from diffusers import AutoencoderKLWan

    downsample = [False, True, True]  # in time; 8 pixels and 4 frames become one latent, as in Wan 2.1
    vae = AutoencoderKLWan(base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=downsample).eval()
    with torch.no_grad():
        latents = [vae.encode(v.transpose(0, 1)[None] / 127.5 - 1).latent_dist.mode()[0].flatten(1) for v in videos]
    std, mean = torch.std_mean(torch.cat(latents, dim=1), dim=1)
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    return vae


def _transformer(layers: int) -> Any:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=64,
        text_dim=TEXT_WIDTH,
        freq_dim=64,
        ffn_dim=256,
        num_layers=layers,
    ).eval()
