"""A file of diffusers' Wan in the code of Wan's authors, and back."""

from __future__ import annotations

from pathlib import Path

import torch

import salad_compile
from salad_compile.exchange import to_original_names
from tests.models.zoo import WAN, from_diffusers, randomise
from tests.support import randomise_branches, relative_error, seeded
from tests.wild.models import wan
from tests.wild.stand_ins import open_site

open_site()
CHANGES = {"num_attention_heads": 4, "text_dim": 20, "freq_dim": 16, "ffn_dim": 64, "cross_attn_norm": True}


def test_the_release_computes_what_diffusers_does(tmp_path: Path) -> None:
    given = wan.inputs()
    text = torch.zeros(1, wan.CONFIG["text_len"], 20)
    text[0, : len(given["context"][0])] = given["context"][0]
    call = {"hidden_states": given["x"][0][None], "timestep": given["t"], "encoder_hidden_states": text}
    with seeded(3):
        base = randomise(from_diffusers("WanTransformer3DModel", WAN | CHANGES), 3).eval()
    original = wan.model("model", "WanModel", in_dim=4, out_dim=4)().eval()
    original.load_state_dict(to_original_names(base.state_dict()))
    config = salad_compile.SaladConfig(
        compensation="none", sparsity=0.6, query_block=16, key_block=16, lora_rank=2, min_tokens=30
    )
    salad_compile.convert(base, config, example_inputs=call)
    randomise_branches(base)
    salad_compile.load(original, salad_compile.save(base, tmp_path / "a.safetensors"), example_inputs=given)
    with torch.no_grad():
        expected, found = base(**call).sample, original(**given)[0][None]
    assert relative_error(found, expected) < 1e-5
