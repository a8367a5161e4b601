"""Settings of single sites: which stay dense, which differ, and what does not suit a site."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import salad_compile
from salad_compile.errors import ConfigError, PatternError, SiteFilterError
from salad_compile.sites.branch import branches
from tests import support, toys
from tests.models.registry import ALL_CASES
from tests.support import TINY

WAN = ALL_CASES["Wan"]


def convert_wan(**changes: Any) -> torch.nn.Module:
    return support.converted(WAN, randomise=False, **changes)


def test_the_first_layers_may_stay_dense() -> None:
    config = dataclasses.replace(TINY, dense_layers=1)
    plan = salad_compile.plan(WAN.build(), dict(WAN.inputs(0)), config=config)
    assert [site.name for site in plan.eligible] == ["blocks.1.attn1"]
    assert "dense_layers" in next(site.reason for site in plan.sites[""] if site.name == "blocks.0.attn1")
    assert list(branches(convert_wan(dense_layers=1))) == ["blocks.1.attn1.salad"]


def test_sites_may_differ_in_sparsity_pattern_and_branch() -> None:
    given = {
        "blocks.*": {"sparsity": 0.5},
        "blocks.1.*": {"pattern": "stswa", "linear_branch": False},
    }
    first, second = branches(convert_wan(overrides=given)).values()
    assert (first.decoded_spec().pattern, second.decoded_spec().pattern) == ("topk", "stswa")
    assert (int(first.permille), int(second.permille)) == (500, 500)
    assert first.decoded_spec().permille == second.decoded_spec().permille == 500
    assert hasattr(first, "proj_weight")
    assert not hasattr(second, "proj_weight")
    assert next(iter(first.tensors().values())) is first.gate_weight


def test_one_sparsity_for_all_needs_no_tensor() -> None:
    branch = next(iter(branches(convert_wan()).values()))
    assert not hasattr(branch, "permille")
    assert not branch.decoded_spec().adjustable


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"blocks.0.*": {"sparsty": 0.5}}, "sparsity"),
        ({"blocks.0.*": {"sparsity": 1.5}}, "in \\[0, 1\\)"),
        ({"blocks.0.*": {"pattern": "window"}}, "stswa"),
        ({"blocks.0.*": 0.5}, "maps globs"),
        ([("blocks.0.*", {})], "maps globs"),
    ],
)
def test_wrong_overrides(overrides: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(TINY, overrides=overrides)


def unchanged_after(error: type[Exception], message: str, **changes: Any) -> None:
    model = WAN.build()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(error, match=message):
        salad_compile.convert(model, dataclasses.replace(TINY, **changes), example_inputs=dict(WAN.inputs(0)))
    assert not branches(model)
    assert before == {name: p.requires_grad for name, p in model.named_parameters()}


def test_an_override_that_matches_nothing() -> None:
    unchanged_after(SiteFilterError, "matches no attention call", overrides={"block.*": {"sparsity": 0.5}})


def test_a_window_larger_than_the_video() -> None:
    unchanged_after(PatternError, "reaches beyond", pattern="stswa", window=100_000)


def test_windows_need_the_grid() -> None:
    x = toys.tokens(105)
    config = dataclasses.replace(TINY, pattern="stswa")
    model = toys.Stack(toys.SelfAttention())
    with pytest.raises(PatternError, match=r"grid=\(T, H, W\)"):
        salad_compile.convert(model, config, example_inputs=(x,))
    assert not branches(model)
    salad_compile.convert(model, config, example_inputs=(x,), grid=(3, 5, 7))
    assert len(branches(model)) == 1


def test_windows_take_no_mask() -> None:
    case = ALL_CASES["HunyuanVideo"]
    config = dataclasses.replace(TINY, pattern="stswa")
    with pytest.raises(PatternError, match="mask"):
        salad_compile.convert(case.build(), config, example_inputs=dict(case.inputs(0)))


def test_heads_start_alternately() -> None:
    branch = next(iter(branches(convert_wan(pattern="stswa")).values()))
    assert branch.temporal_heads.tolist() == [head % 2 == 1 for head in range(branch.record.heads)]


def test_windows_need_a_conversion() -> None:
    with pytest.raises(ConfigError, match="without conversion"):
        salad_compile.config.BackendOptions.from_options({"pattern": "stswa"})
