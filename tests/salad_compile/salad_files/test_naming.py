"""Wan's two namings: exact inverses, and the one that diffusers' own loader understands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
from safetensors.torch import save_file

from salad_compile.errors import ConfigError
from salad_compile.salad_files.naming import to_diffusers_names, to_original_names
from tests.models.zoo import CASES, WAN, from_diffusers, randomise

IMAGE = {"image_dim": 8, "added_kv_proj_dim": 24, "cross_attn_norm": True}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "text to video": ("WanTransformer3DModel", {}),
    "image to video": ("WanTransformer3DModel", IMAGE),
    "first and last frame": ("WanTransformer3DModel", IMAGE | {"pos_embed_seq_len": 6}),
    "VACE": ("WanVACETransformer3DModel", {"vace_layers": [0, 1], "vace_in_channels": 6}),
}


def tiny(name: str) -> nn.Module:
    cls, changes = MODELS[name]
    return randomise(from_diffusers(cls, WAN | changes), 1).eval()


@pytest.mark.parametrize("name", MODELS)
def test_both_ways_are_exact_inverses(name: str) -> None:
    state = tiny(name).state_dict()
    original = to_original_names(state)
    assert len(original) == len(state)
    assert original.keys() - state.keys()
    back = to_diffusers_names(original)
    assert list(back) == list(state)
    assert all(back[key] is not None and torch.equal(back[key], state[key]) for key in state)


def test_names_of_the_original_release() -> None:
    """Written out by hand, not derived from the table."""
    pairs = {
        "blocks.12.attn1.to_out.0.bias": "blocks.12.self_attn.o.bias",
        "blocks.1.attn2.add_k_proj.weight": "blocks.1.cross_attn.k_img.weight",
        "blocks.1.attn2.norm_added_k.weight": "blocks.1.cross_attn.norm_k_img.weight",
        "blocks.0.norm2.weight": "blocks.0.norm3.weight",
        "blocks.0.norm3.weight": "blocks.0.norm2.weight",
        "blocks.0.scale_shift_table": "blocks.0.modulation",
        "blocks.0.ffn.net.0.proj.weight": "blocks.0.ffn.0.weight",
        "scale_shift_table": "head.modulation",
        "proj_out.weight": "head.head.weight",
        "condition_embedder.time_proj.bias": "time_projection.1.bias",
        "condition_embedder.image_embedder.ff.net.2.weight": "img_emb.proj.3.weight",
        "blocks.0.attn1.to_q.lora_A.weight": "blocks.0.self_attn.q.lora_A.weight",
        "blocks.0.attn1.to_q": "blocks.0.self_attn.q",
    }
    assert to_original_names(dict.fromkeys(pairs)).keys() == set(pairs.values())
    assert list(to_original_names({name: at for at, name in enumerate(pairs)})) == list(pairs.values())
    assert list(to_diffusers_names(dict.fromkeys(pairs.values()))) == list(pairs)


@pytest.mark.parametrize("name", ["text to video", "image to video", "VACE"])
def test_diffusers_own_loader_reads_the_original_names(name: str, tmp_path: Path) -> None:
    model: Any = tiny(name)
    model.save_config(tmp_path)
    file = tmp_path / "original.safetensors"
    save_file({key: value.clone() for key, value in to_original_names(model.state_dict()).items()}, file)
    again = type(model).from_single_file(str(file), config=str(tmp_path), local_files_only=True)
    state, expected = again.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    "name", ["transformer.blocks.0.attn1.to_q.weight", "blocks.0.attn1.salad.gate_weight", "blocks.0.attn1.q.weight"]
)
def test_an_unknown_name_is_an_error_that_names_it(name: str) -> None:
    with pytest.raises(ConfigError, match=name.replace(".", r"\.")):
        to_original_names({name: 0})
    with pytest.raises(ConfigError, match="not one of the original names"):
        to_diffusers_names({"blocks.0.attn1.to_q.weight": 0})


def test_every_converted_projection_of_the_zoos_wan_has_an_original_name() -> None:
    for projection in CASES["Wan"].projections.values():
        assert list(to_diffusers_names(to_original_names({projection: 0}))) == [projection]
