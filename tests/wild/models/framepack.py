"""framepack: HunyuanVideo whose history is packed before the video."""

from __future__ import annotations

from typing import Any

from tests.models.registry import ALL_CASES
from tests.models.zoo_joint import HUNYUAN
from tests.wild.models.copies import copy_of, made

MODULE, NAME = "framepack.diffusers_helper.models.hunyuan_video_packed", "HunyuanVideoTransformer3DModelPacked"
CONFIG = HUNYUAN | {  # 16 channels stand in its code
    "in_channels": 16,
    "guidance_embeds": True,
    "has_image_proj": True,
    "image_proj_dim": 14,
    "has_clean_x_embedder": True,
}
_RENAMED = {
    "image_embeds": "image_embeddings",
    "indices_latents": "latent_indices",
    "latents_clean": "clean_latents",
    "indices_latents_clean": "clean_latent_indices",
    "latents_history_2x": "clean_latents_2x",
    "indices_latents_history_2x": "clean_latent_2x_indices",
    "latents_history_4x": "clean_latents_4x",
    "indices_latents_history_4x": "clean_latent_4x_indices",
}


def inputs() -> dict[str, Any]:
    given = {_RENAMED.get(name, name): value for name, value in ALL_CASES["HunyuanVideoFramepack"].inputs(0).items()}
    for name, value in given.items():
        if name.endswith("indices"):
            given[name] = value[None]
        elif "latents" in name or name == "hidden_states":
            given[name] = value.repeat_interleave(4, dim=1)
    return given | {"encoder_attention_mask": given["encoder_attention_mask"].long()}


ENTRIES = {
    f"{MODULE}.{NAME}": copy_of(
        "HunyuanVideoFramepack",
        made(MODULE, NAME, CONFIG),
        inputs=inputs,
        grid=None,
        flat="no argument shows a grid",
        fullgraph=False,
    )
}

WITHOUT_ENTRY: dict[str, str] = {
    "framepack.diffusers_helper.models.hunyuan_video_packed.HunyuanVideoIndividualTokenRefiner": "refines text"
}
