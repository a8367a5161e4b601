"""The registry of sparse patterns, and a third pattern that is one more file in its folder."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor

import salad_compile
from salad_compile.config import BackendOptions, SaladConfig
from salad_compile.conversion.cost import site_cost
from salad_compile.definition import patterns
from salad_compile.errors import ConfigError
from salad_compile.sites.branch import branches
from tests.models.registry import ALL_CASES
from tests.support import TINY, check_rewrite, converted, relative_error

WAN = ALL_CASES["Wan"]
INPUTS = dict(WAN.inputs(0))


@pytest.fixture
def diagonal(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if the file toy_patterns/diagonal.py lay in the folder of patterns."""
    monkeypatch.setattr(patterns, "__path__", [*patterns.__path__, str(Path(__file__).parent / "toy_patterns")])
    monkeypatch.setattr(patterns, "_loaded", dict(patterns._loaded))
    yield
    sys.modules.pop(f"{patterns.__name__}.diagonal", None)


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return WAN.output(model(**INPUTS))


def toy(**changes: Any) -> nn.Module:
    return converted(WAN, pattern="diagonal", **changes)


def test_an_unknown_pattern_is_an_error_that_lists_the_known() -> None:
    for look in (patterns.find, lambda name: SaladConfig(compensation="none", pattern=name)):
        with pytest.raises(ConfigError, match=r"'stswa', 'topk'.*Did you mean 'stswa'"):
            look("stwsa")
    with pytest.raises(ConfigError, match="pattern"):
        SaladConfig(compensation="none", pattern="diagonal")


def test_one_name_means_one_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "_loaded", dict(patterns._loaded))
    known = patterns.find("topk")
    patterns.register(known)
    with pytest.raises(ConfigError, match="two patterns called 'topk'"):
        patterns.register(type(known)())


def test_every_file_declares_the_pattern_that_it_is_named_after() -> None:
    expected = ("error16", "error8", "mass16", "mass8", "stswa", "topk")
    assert {name: patterns.find(name).name for name in patterns.names()} == dict(zip(expected, expected, strict=True))


@pytest.mark.usefixtures("diagonal")
def test_a_new_pattern_is_chosen_by_its_name() -> None:
    assert "diagonal" in patterns.names()
    assert SaladConfig(compensation="none", pattern="diagonal").spec.pattern == "diagonal"
    with pytest.raises(ConfigError, match="without conversion: it has tensors of its own"):
        BackendOptions(pattern="diagonal")
    plan = salad_compile.plan(
        WAN.build(), INPUTS, config=SaladConfig(compensation="none", pattern="diagonal", min_tokens=90)
    )
    assert [site.name for site in plan.eligible] == list(WAN.sites)


@pytest.mark.usefixtures("diagonal")
def test_a_new_pattern_runs_compiled_as_uncompiled() -> None:
    """Output and all gradients, with heads that look to different sides."""
    model = toy()
    for branch in branches(model).values():
        branch.get_buffer("diagonal_offsets").copy_(torch.arange(branch.record.heads))
    check_rewrite(model, INPUTS, WAN.output, sites=len(WAN.sites))


@pytest.mark.usefixtures("diagonal")
def test_a_new_pattern_is_dense_at_sparsity_zero_and_only_there() -> None:
    dense = output(WAN.build())
    assert relative_error(output(toy(randomise=False, sparsity=0.0)), dense) < 1e-5
    assert relative_error(output(toy(randomise=False, sparsity=0.7)), dense) > 1e-3


@pytest.mark.usefixtures("diagonal")
def test_the_tensors_of_a_new_pattern_are_saved(tmp_path: Path) -> None:
    model = toy(lowest_sparsity=0.2)
    before = output(model)
    for branch in branches(model).values():
        branch.get_buffer("diagonal_offsets").fill_(2)
    salad_compile.set_sparsity(model, 0.5)
    after = output(model)
    assert relative_error(after, before) > 1e-3
    loaded = salad_compile.load(WAN.build(), salad_compile.save(model, tmp_path / "salad.safetensors"))
    assert torch.equal(output(loaded), after)


@pytest.mark.usefixtures("diagonal")
def test_a_new_pattern_is_summarised_and_calibrated() -> None:
    model = toy()
    output(model)
    for branch in branches(model).values():
        assert "diagonal" in branch.extra_repr()
        cost = site_cost(branch)
        assert branch.measured_sparsity is not None
        assert cost.sparse / cost.dense == pytest.approx(1 - branch.measured_sparsity)
        assert cost.routing == 0
    assert all(site.measured_sparsity for site in salad_compile.summary(model).sites)
    curve = salad_compile.calibrate(model, INPUTS, target=0.5, sparsities=(0.3, 0.8)).sites[0].curve
    assert curve[0][1] < curve[1][1]
    with pytest.raises(ConfigError, match="sliding windows"):
        salad_compile.calibrate_heads(model, INPUTS)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("pattern", ["topk", "stswa"])
def test_the_cost_is_what_is_computed(pattern: str, window: int | None) -> None:
    """Top-K counts kept blocks as full: which of them is the short last one, the data decide."""
    model = converted(WAN, pattern=pattern, window=window)
    output(model)
    for branch in branches(model).values():
        cost = site_cost(branch)
        assert branch.measured_sparsity is not None
        too_many = cost.sparse / cost.dense - (1 - branch.measured_sparsity)
        assert -1e-9 < too_many < (1e-9 if pattern == "stswa" else TINY.key_block / branch.record.tokens)
        assert (cost.routing > 0) == (pattern == "topk")


def test_other_tensors_follow_the_table() -> None:
    """Initial values, and what is counted for them."""
    branch = next(iter(branches(converted(WAN, randomise=False, pattern="stswa", scaling="v2")).values()))
    width, heads = branch.record.width, branch.record.heads
    assert branch.branch_names == (
        "gate_weight",
        "gate_bias",
        "proj_weight",
        "proj_bias",
        "layer_scale",
        "head_scale",
        "temporal_heads",
    )
    assert branch.gate_weight.eq(0).all()
    assert branch.proj_weight.shape == (width, width)
    assert branch.proj_weight.eq(0).all()
    assert branch.head_scale.eq(1).all()
    assert branch.head_scale.shape == (heads,)
    assert branch.low_rank_query_down.shape[0] == TINY.lora_rank
    assert branch.low_rank_query_down.ne(0).any()
    assert branch.low_rank_query_up.eq(0).all()
    cost = site_cost(branch)
    tokens = branch.record.batch * branch.record.tokens
    assert cost.projection == 2 * tokens * width**2
    assert cost.linear == 2 * tokens * (2 * branch.record.head_dim * width + branch.gate_weight.numel())
