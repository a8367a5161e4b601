"""An item with its first frame, and what a pipeline gives its transformer for the same one."""

from __future__ import annotations

from typing import Any

import torch

from salad_compile.latents import LatentItem
from salad_compile.latents.encoding.pipeline import PipelineEncoder
from tests.models.zoo import randomise
from tests.salad_compile.latents.encoding import world

CAPTION = "a cat walks on the grass"
FRAMES, HEIGHT, WIDTH = 9, 64, 96


def prepare(pipe: Any) -> Any:
    """The pipeline with a transformer that is random everywhere, and without a progress bar."""
    randomise(pipe.transformer, 1)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def encoded(pipe: Any, seed: int, fps: float) -> LatentItem:
    """A clip as `latents encode` writes it."""
    pixels = torch.from_numpy(world.moving(FRAMES, HEIGHT, WIDTH, seed)).permute(0, 3, 1, 2)
    found = PipelineEncoder(pipe).encode(pixels, CAPTION)
    return LatentItem(f"clip{seed}", found.latent, found.text, CAPTION, fps, found.extras)


def given_by(pipe: Any, text_tokens: int) -> dict[str, Any]:
    """What the pipeline calls its transformer with, in the first step for the first frame of clip 0."""
    from PIL import Image

    calls: list[dict[str, Any]] = []
    hook = pipe.transformer.register_forward_pre_hook(lambda _, __, kwargs: calls.append(kwargs), with_kwargs=True)
    image = Image.fromarray(world.moving(FRAMES, HEIGHT, WIDTH)[0])
    size = {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES}
    options = {"num_inference_steps": 1, "guidance_scale": 1.0, "max_sequence_length": text_tokens}
    pipe(image=image, prompt=CAPTION, output_type="latent", **size, **options)
    hook.remove()
    return calls[0]
