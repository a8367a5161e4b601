"""Names of Wan's parameters: diffusers' and those of the original release, which ComfyUI uses; both ways, exactly.

The pairs are those of diffusers' own single-file loader and of its conversion script (0.42); a test holds them against
that loader. Original names: https://github.com/Wan-Video/Wan2.1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

from salad_compile.errors import ConfigError

Value = TypeVar("Value")

# diffusers classes whose names are known here
WAN_CLASSES = ("WanTransformer3DModel", "WanVACETransformer3DModel")

_ATTENTION = {
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "o",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
    "add_k_proj": "k_img",
    "add_v_proj": "v_img",
    "norm_added_k": "norm_k_img",
}
# diffusers calls the norm before cross-attention norm2, the original release norm3
_BLOCK = {
    **{f"attn1.{ours}": f"self_attn.{theirs}" for ours, theirs in _ATTENTION.items()},
    **{f"attn2.{ours}": f"cross_attn.{theirs}" for ours, theirs in _ATTENTION.items()},
    "norm1": "norm1",
    "norm2": "norm3",
    "norm3": "norm2",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "scale_shift_table": "modulation",
    "proj_in": "before_proj",
    "proj_out": "after_proj",
}
_ROOT = {
    "patch_embedding": "patch_embedding",
    "vace_patch_embedding": "vace_patch_embedding",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
    "condition_embedder.image_embedder.pos_embed": "img_emb.emb_pos",
    "proj_out": "head.head",
    "scale_shift_table": "head.modulation",
}


def to_original_names(state_dict: Mapping[str, Value]) -> dict[str, Value]:
    """Rename the parameters of a diffusers WanTransformer3DModel to the names of the original release.

    Args:
        state_dict: names without a prefix such as `transformer.`, with anything behind them: `.weight`,
            `.lora_A.weight`. The values are passed on as they are.

    Raises:
        ConfigError: a name that diffusers' Wan does not have.
    """
    return {original_name(name): value for name, value in state_dict.items()}


def to_diffusers_names(state_dict: Mapping[str, Value]) -> dict[str, Value]:
    """The inverse of :func:`to_original_names`.

    Raises:
        ConfigError: a name that the original Wan does not have.
    """
    return {diffusers_name(name): value for name, value in state_dict.items()}


def original_name(name: str) -> str:
    """One name of :func:`to_original_names`: of a module, of its parameter, or of something behind that."""
    return _rename(name, _BLOCK, _ROOT, "diffusers")


def diffusers_name(name: str) -> str:
    """The inverse of :func:`original_name`."""
    return _rename(name, _invert(_BLOCK), _invert(_ROOT), "original")


def _rename(name: str, block: Mapping[str, str], root: Mapping[str, str], which: str) -> str:
    found = re.match(r"(?:vace_)?blocks\.\d+\.", name)
    start, known = (found[0], block) if found else ("", root)
    rest = name[len(start) :]
    for before, after in known.items():
        if rest == before or rest.startswith(f"{before}."):
            return start + after + rest[len(before) :]
    raise ConfigError(
        f"{name!r} is not one of the {which} names of a Wan transformer. Names come without a prefix (`transformer.`, "
        "`diffusion_model.`), and without the parameters of SALAD."
    )


def _invert(names: Mapping[str, str]) -> dict[str, str]:
    return {after: before for before, after in names.items()}
