"""One file for diffusers' Wan, the original Wan and ComfyUI's: the same output from the same weights, all ways."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import salad_compile
from salad_compile.errors import BaseModelMismatchError
from salad_compile.exchange import to_original_names
from salad_compile.sites.branch import branches
from tests.models.original_wan import NodeWanModel, WanModel
from tests.models.zoo import WAN, from_diffusers, randomise
from tests.support import randomise_branches, relative_error, seeded

CONFIG = salad_compile.SaladConfig(
    compensation="none",
    sparsity=0.6,
    query_block=16,
    key_block=16,
    lora_rank=2,
    min_tokens=90,
    overrides={"blocks.0.attn1": {"sparsity": 0.3}},
)
VIDEO, TIME, TEXT = (4, 3, 14, 14), torch.tensor([431.0]), 6


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def inputs(model: nn.Module) -> dict[str, Any]:
    video, text = draw(1, *VIDEO), draw(1, TEXT, 16)
    if isinstance(model, NodeWanModel):
        return {"x": video, "timestep": TIME, "context": text}
    if isinstance(model, WanModel):
        return {"x": [video[0]], "t": TIME, "context": [text[0]], "seq_len": 147}
    return {"hidden_states": video, "timestep": TIME, "encoder_hidden_states": text}


def output(model: nn.Module, compiled: bool = False) -> Tensor:
    call = torch.compile(model, backend="salad", options={"lowering": "eager"}) if compiled else model
    with torch.no_grad():
        out = call(**inputs(model))
    return out[0][None] if isinstance(out, list) else out if isinstance(out, Tensor) else out.sample


def diffusers_wan(**changes: Any) -> Any:
    with seeded(3):
        return randomise(from_diffusers("WanTransformer3DModel", WAN | changes), 3).eval()


def other(kind: type[WanModel]) -> WanModel:
    """With the weights of :func:`diffusers_wan`."""
    model = kind().eval()
    model.load_state_dict(to_original_names(diffusers_wan().state_dict()))
    return model


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """A file of diffusers' Wan, and what the model computes."""
    model = diffusers_wan()
    salad_compile.convert(model, CONFIG, example_inputs=inputs(model))
    randomise_branches(model)
    path = salad_compile.save(model, tmp_path_factory.mktemp("trained") / "salad.safetensors")
    return path, output(model)


@pytest.mark.parametrize("kind", [WanModel, NodeWanModel])
def test_all_implementations_compute_the_same(
    kind: type[WanModel], trained: tuple[Path, Tensor], tmp_path: Path
) -> None:
    file, expected = trained
    model = other(kind)
    dense = output(model)
    assert relative_error(dense, output(diffusers_wan())) < 1e-5
    salad_compile.load(model, file, example_inputs=inputs(model))
    assert [b.record.owner for b in branches(model).values()] == ["blocks.0.self_attn", "blocks.1.self_attn"]
    assert relative_error(output(model), expected) < 1e-5
    assert relative_error(dense, expected) > 1e-2
    back = salad_compile.load(diffusers_wan(), salad_compile.save(model, tmp_path / "back.safetensors"))
    assert relative_error(output(back), expected) < 1e-5
    sparsities = [round(site.target_sparsity, 3) for site in salad_compile.summary(back).sites]
    assert sparsities == [0.3, 0.6]


def test_compiled_and_into_a_model_that_is_converted(trained: tuple[Path, Tensor]) -> None:
    file, expected = trained
    model = salad_compile.load(other(NodeWanModel), file, example_inputs=inputs(other(NodeWanModel)))
    assert relative_error(output(model, compiled=True), expected) < 1e-5
    randomise_branches(model, seed=9)
    assert relative_error(output(model), expected) > 1e-3
    salad_compile.load(model, file)
    assert relative_error(output(model), expected) < 1e-5


def test_from_one_original_to_another(trained: tuple[Path, Tensor], tmp_path: Path) -> None:
    file, expected = trained
    first = salad_compile.load(other(WanModel), file, example_inputs=inputs(other(WanModel)))
    saved = salad_compile.save(first, tmp_path / "first.safetensors")
    second = salad_compile.load(other(NodeWanModel), saved, example_inputs=inputs(other(NodeWanModel)))
    assert relative_error(output(second), expected) < 1e-5


class Renamed(NodeWanModel):
    """With a part that the release has not."""

    def __init__(self) -> None:
        super().__init__()
        self.camera = nn.Linear(3, 3)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (Renamed, "belongs to a WanTransformer3DModel, and this model is a Renamed"),
        (lambda: from_diffusers("SkyReelsV2Transformer3DModel", WAN), "this model is a SkyReelsV2Transformer3DModel"),
        (NodeWanModel, "pass|example_inputs"),
    ],
)
def test_other_networks_are_refused(make: Any, said: str, trained: tuple[Path, Tensor]) -> None:
    model = make()
    before = list(model.state_dict())
    with pytest.raises(BaseModelMismatchError, match=said) as caught:
        salad_compile.load(model, trained[0])
    assert "\n" not in str(caught.value)
    assert list(model.state_dict()) == before


def test_other_widths_are_refused(tmp_path: Path) -> None:
    wide = diffusers_wan(num_attention_heads=3)
    salad_compile.convert(wide, dataclasses.replace(CONFIG, overrides={}), example_inputs=inputs(wide))
    file = salad_compile.save(wide, tmp_path / "wide.safetensors")
    model = other(WanModel)
    with pytest.raises(BaseModelMismatchError, match="with other widths or heads"):
        salad_compile.load(model, file, example_inputs=inputs(model))
    assert not branches(model)
