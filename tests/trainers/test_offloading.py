"""Recipe: offloading and caches of accelerate and diffusers, turned on before conversion or after it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import remove_hook_from_submodules
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from safetensors.torch import load_file

import salad_compile
from salad_compile.errors import WrappedModelError
from salad_compile.sites.branch import branches
from tests.support import relative_error
from tests.trainers.tiny import CONFIG, INPUTS, base, converted, output

CPU = torch.device("cpu")
SAME = 1e-6  # of fp32


def group(level: str, **more: Any) -> Callable[[Any, Path], None]:
    settings = {"onload_device": CPU, "offload_device": CPU, "offload_type": level, **more}
    if level == "block_level":
        settings["num_blocks_per_group"] = 1
    return lambda model, folder: model.enable_group_offload(**settings)


def on_disk(level: str) -> Callable[[Any, Path], None]:
    return lambda model, folder: group(level, offload_to_disk_path=str(folder / "disk"))(model, folder)


OFFLOADING: dict[str, Callable[[Any, Path], Any]] = {
    "sequential": lambda model, folder: cpu_offload(model, CPU),
    "leaves": group("leaf_level"),
    "blocks": group("block_level"),
    "disk": lambda model, folder: disk_offload(model, str(folder / "disk"), CPU),
    "blocks on disk": on_disk("block_level"),
    "leaves on disk": on_disk("leaf_level"),
}


def values(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.device.type != "meta"}


# On a disk accelerate is enough here: `test_offloaded_after_conversion` has diffusers too.
BEFORE = [pytest.param(name, marks=pytest.mark.all_cases if name.endswith(" on disk") else ()) for name in OFFLOADING]


@pytest.mark.parametrize("name", BEFORE)
def test_a_plan_of_an_offloaded_model_changes_nothing(name: str, tmp_path: Path) -> None:
    model = base()
    OFFLOADING[name](model, tmp_path)
    places, before = {n: p.device for n, p in model.named_parameters()}, values(model)
    plan = salad_compile.plan(model, example_inputs=dict(INPUTS), config=CONFIG)
    assert len(plan.eligible) == 2
    with pytest.raises(salad_compile.SaladError):
        salad_compile.convert(model, CONFIG, example_inputs={"hidden_states": torch.ones(3)})
    assert {n: p.device for n, p in model.named_parameters()} == places
    if "disk" not in name:  # else what a parameter holds between two forwards means nothing
        assert all(torch.equal(value, before[n]) for n, value in values(model).items())
    assert relative_error(output(model), output(base())) < SAME


@pytest.mark.parametrize("name", BEFORE)
def test_offloaded_before_conversion(name: str, tmp_path: Path) -> None:
    file = salad_compile.save(converted(), tmp_path / "before.safetensors")
    model = base()
    OFFLOADING[name](model, tmp_path)
    salad_compile.convert(model, CONFIG, example_inputs=dict(INPUTS))
    output(model)
    salad_compile.load(model, file)
    assert relative_error(output(model), output(converted())) < SAME
    saved, expected = load_file(salad_compile.save(model, tmp_path / "after.safetensors")), load_file(file)
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", OFFLOADING)
def test_offloaded_after_conversion(name: str, tmp_path: Path) -> None:
    expected = load_file(salad_compile.save(converted(), tmp_path / "before.safetensors"))
    other = salad_compile.save(converted(1), tmp_path / "other.safetensors")
    model = converted()
    OFFLOADING[name](model, tmp_path)
    assert relative_error(output(model), output(converted())) < SAME
    saved = load_file(salad_compile.save(model, tmp_path / "after.safetensors"))
    assert all(torch.equal(saved[key], expected[key]) for key in expected)
    if "disk" in name:
        with pytest.raises(WrappedModelError, match="load first, then offload"):
            salad_compile.load(model, other)
        return
    salad_compile.load(model, other)
    assert relative_error(output(model), output(converted(1))) < SAME


def test_our_parameters_are_moved_with_those_of_their_site(tmp_path: Path) -> None:
    model = base()
    OFFLOADING["sequential"](model, tmp_path)
    salad_compile.convert(model, CONFIG, example_inputs=dict(INPUTS))
    places = {p.device.type for branch in branches(model).values() for p in branch.parameters()}
    assert places == {"meta"}
    remove_hook_from_submodules(model)
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert relative_error(output(model), output(base())) > 1e-3  # still sparse: our forward is inside of theirs


@pytest.mark.parametrize("name", ["sequential", "leaves"])
def test_offloaded_and_compiled(name: str, tmp_path: Path) -> None:
    torch._dynamo.reset()
    model = converted()
    OFFLOADING[name](model, tmp_path)
    compiled = torch.compile(model, backend="salad", options={"lowering": "eager"})
    assert relative_error(output(compiled), output(converted())) < SAME
    torch._dynamo.reset()


def test_layerwise_casting_before_and_after() -> None:
    casts = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.float32}
    after = converted()
    after.enable_layerwise_casting(**casts)
    before = base()
    before.enable_layerwise_casting(**casts)
    salad_compile.convert(before, CONFIG, example_inputs=dict(INPUTS))
    before.load_state_dict({n: t for n, t in converted().state_dict().items() if ".salad." in n}, strict=False)
    assert relative_error(output(before), output(after)) < SAME


CACHES = {
    "first block": lambda: FirstBlockCacheConfig(threshold=0.0),
    "attention": lambda: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    ),
}


@pytest.mark.parametrize("name", CACHES)
def test_a_cache_before_conversion(name: str) -> None:
    model = base()
    model.enable_cache(CACHES[name]())
    salad_compile.convert(model, CONFIG, example_inputs=dict(INPUTS))
    assert len(branches(model)) == 2
    model.load_state_dict({n: t for n, t in converted().state_dict().items() if ".salad." in n}, strict=False)
    with model.cache_context("cond"):
        for _ in range(3):  # hits of the cache among them
            assert relative_error(output(model), output(converted())) < SAME
    model.disable_cache()
    assert relative_error(output(model), output(converted())) < SAME, "the cache took ours with it"


def test_a_hook_that_breaks_the_graph_leaves_the_token_order() -> None:
    torch._dynamo.reset()
    model = converted()
    model.blocks[0].register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
    compiled = torch.compile(model, backend="salad", options={"lowering": "eager"})
    assert relative_error(output(compiled), output(converted())) < SAME
    torch._dynamo.reset()
