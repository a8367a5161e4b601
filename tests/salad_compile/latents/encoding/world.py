"""Real small videos, and tiny pipelines of the real classes of diffusers and transformers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from salad_compile.latents.encoding.encode import EncodingReport, encode_clips
from salad_compile.latents.encoding.finding import find_clips
from salad_compile.latents.encoding.pipeline import PipelineEncoder
from salad_compile.latents.encoding.sizes import ClipSize
from tests.support import seeded

TEXT_WIDTH = 16
WORDS = ["a", "cat", "dog", "bird", "walks", "runs", "sleeps", "on", "in", "the", "grass", "snow", "red", "blue"]
SIZE = ClipSize((5,), 32, 48)


def moving(frames: int, height: int = 40, width: int = 64, seed: int = 0) -> Any:
    """(F, H, W, 3) uint8: a square that wanders over a gradient, dark in one frame and lighter in the next."""
    rows, columns = numpy.mgrid[0:height, 0:width]
    found = numpy.zeros((frames, height, width, 3), numpy.uint8)
    for number in range(frames):
        found[number, ..., 0] = 255 * columns // width
        found[number, ..., 1] = (255 * rows // height + 9 * seed) % 256
        found[number, ..., 2] = min(12 * number, 255)
        place = (2 * number + 3 * seed) % max(1, min(height, width) - 8)
        found[number, place : place + 8, place : place + 8] = 255
    return found


def write_video(file: Path, frames: Any, fps: int = 8, codec: str | None = None) -> Path:
    """Encode frames as the suffix says: mp4 (H.264), webm (VP9) or gif."""
    av = pytest.importorskip("av")
    file.parent.mkdir(parents=True, exist_ok=True)
    names = {".mp4": ("libx264", "yuv420p"), ".webm": ("libvpx-vp9", "yuv420p"), ".gif": ("gif", "rgb8")}
    name, pixels = names[file.suffix]
    with av.open(str(file), "w") as container:
        stream = container.add_stream(codec or name, rate=fps)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], pixels
        if name == "libx264":
            stream.options = {"crf": "4", "preset": "ultrafast"}
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return file


def write_images(folder: Path, frames: Any) -> Path:
    """A folder of images, with numbers that letters would put in another order."""
    from PIL import Image

    folder.mkdir(parents=True)
    for number, picture in enumerate(frames):
        Image.fromarray(picture).save(folder / f"frame{number}.png")
    return folder


def write_clips(folder: Path, names: Sequence[str] = ("cat.mp4", "dog.mp4", "birds/one.mp4"), frames: int = 9) -> Path:
    """Videos with a caption beside each."""
    for number, name in enumerate(names):
        file = write_video(folder / name, moving(frames, seed=number))
        file.with_suffix(".txt").write_text(f"a {WORDS[1 + number % 3]} walks on the grass\n")
    return folder


def tokenizer() -> Any:
    from transformers import T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces = [(f"▁{word}", -1.0) for word in WORDS] + [(letter, -5.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    return T5Tokenizer(vocab=[*special, *pieces], extra_ids=0)


def t5(kind: str = "T5", width: int = TEXT_WIDTH) -> Any:
    """A text encoder of one layer, T5 or UMT5."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(tokenizer()), d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return getattr(transformers, f"{kind}EncoderModel")(config).eval()


def wan_vae(**changes: Any) -> Any:
    from diffusers import AutoencoderKLWan

    small = {"base_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, "temperal_downsample": [False, True, True]}
    return AutoencoderKLWan(**{"z_dim": 16, **small, **changes}).eval()


def wan_transformer(**changes: Any) -> Any:
    from diffusers import WanTransformer3DModel

    small = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 16, "out_channels": 16}
    rest = {"text_dim": TEXT_WIDTH, "freq_dim": 32, "ffn_dim": 48, "num_layers": 1, "rope_max_seq_len": 64}
    return WanTransformer3DModel(**{**small, **rest, **changes}).eval()


@functools.cache
def wan(seed: int = 0) -> Any:
    """A text-to-video Wan 2.1, whose random weights are always the same."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    with seeded(seed):
        return WanPipeline(
            tokenizer=tokenizer(),
            text_encoder=t5("UMT5"),
            vae=wan_vae(),
            scheduler=FlowMatchEulerDiscreteScheduler(),
            transformer=wan_transformer(),
        )


def encode(folder: Path, output: Path, pipeline: Any = None, **options: Any) -> EncodingReport:
    """Encode a folder at :data:`SIZE`."""
    encoder = PipelineEncoder(wan() if pipeline is None else pipeline)
    return encode_clips(find_clips(folder), encoder, output, **{"size": SIZE, "progress": False, **options})


def as_video(pixels: Tensor) -> Tensor:
    """(F, 3, H, W) uint8 as the VAEs of pipelines take it, (1, 3, F, H, W) in [-1, 1]."""
    return pixels.permute(1, 0, 2, 3)[None].float() / 127.5 - 1


def mode_of(vae: Any, video: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = vae.encode(video).latent_dist.mode()
    return found
