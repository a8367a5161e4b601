"""Dropping linear branches: the right ones, in place, remembered by files; what contributes nothing goes unnoticed."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import salad_compile
from salad_compile.analysis.dropping import drop_branches, share_of
from salad_compile.errors import AlreadyConvertedError, ConfigError, InputsError, NotConvertedError, WrappedModelError
from salad_compile.sites.branch import branches
from tests.models.registry import ALL_CASES
from tests.salad_compile.analysis.test_site_call import calls_of, converted, inputs_of
from tests.salad_compile.conversion.test_convert import assert_unchanged, fingerprint
from tests.support import TINY, Recorder, assert_same, check_rewrite, relative_error, run

OPTIONS = {"lowering": "aot_eager"}
GONE = ("gate_weight", "gate_bias", "proj_weight", "proj_bias")


def output(model: Any, name: str = "Wan") -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = ALL_CASES[name].output(model(**inputs_of(name)))
    return out


def scaled(model: nn.Module, factors: list[float]) -> nn.Module:
    """Scale what each site's linear branch adds."""
    with torch.no_grad():
        for branch, factor in zip(branches(model).values(), factors, strict=True):
            branch.proj_weight.mul_(factor)
            branch.proj_bias.mul_(factor)
    return model


@pytest.fixture
def dropped() -> nn.Module:
    model = scaled(converted(), [1.0, 1e-3])
    drop_branches(model, inputs_of(), fraction=0.5)
    return model


def test_the_least_contribution_goes_and_is_measured_by_definition() -> None:
    model = scaled(converted("HunyuanVideo"), [1.0, 0.01, 3.0, 0.1])
    inputs = [inputs_of("HunyuanVideo"), inputs_of("HunyuanVideo", 1)]
    expected: dict[str, list[float]] = {}
    for call in calls_of(model, inputs):
        update = call.update()
        assert update is not None
        rows = call.rows()
        above, below = (t.transpose(1, 2)[rows].double().norm() for t in (update, call.sparse().out))
        expected.setdefault(call.branch.record.owner, []).append(float(above / below))
    report = drop_branches(model, iter(inputs), fraction=0.5)
    for site in report.sites:
        assert site.contribution == pytest.approx(sum(expected[site.name]) / 2, rel=1e-6)
    assert report.dropped == ["transformer_blocks.1.attn", "single_transformer_blocks.1.attn"]
    for branch in branches(model).values():
        is_dropped = branch.record.owner in report.dropped
        assert branch.record.dropped == is_dropped
        assert branch.decoded_spec().linear_branch != is_dropped
        names = dict(branch.named_parameters())
        assert all((name in names) != is_dropped for name in GONE)
        assert "low_rank_query_up" in names
    assert report.variants == 2
    assert "two compilations" in str(report)
    assert json.loads(report.to_json())["parameters"] == 2 * (24 * 24 + 24 + 24 + 1)


# text in the sequence: `test_the_least_contribution_goes_and_is_measured_by_definition` has it, uncompiled
@pytest.mark.parametrize("name", ["Wan", pytest.param("CogVideoX", marks=pytest.mark.all_cases)])
def test_a_branch_with_zero_projection_goes_unnoticed(name: str) -> None:
    model = converted(name)
    count = len(branches(model))
    model = scaled(model, [0.0] + [1.0] * (count - 1))
    before = output(model, name)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="salad", options={"lowering": "eager"})
    compiled_before = output(compiled, name)
    report = drop_branches(compiled, inputs_of(name), fraction=1 / count)
    assert report.dropped == [report.sites[0].name]
    assert report.sites[0].contribution == 0
    assert torch.equal(output(model, name), before)
    assert relative_error(output(compiled, name), compiled_before) < 1e-5


def test_a_branch_that_contributes_is_missed(dropped: nn.Module) -> None:
    model = scaled(converted(), [1.0, 1e-3])
    alone = scaled(converted(), [1.0, 0.0])
    torch.testing.assert_close(output(dropped), output(alone), rtol=0, atol=1e-6)
    assert not torch.equal(output(dropped), output(model))


def test_compiled_equals_uncompiled_with_gradients(dropped: nn.Module) -> None:
    case = ALL_CASES["Wan"]
    check_rewrite(dropped, inputs_of(), case.output, sites=2)


def test_compiled_block_by_block_there_are_two_variants() -> None:
    model, recorder = converted(), Recorder()
    torch._dynamo.reset()
    for block in model.blocks:
        block.compile(backend=recorder)
    output(model)
    assert recorder.graphs == 1
    assert drop_branches(model, inputs_of(), fraction=0.5).variants == 2
    after = output(model)
    assert recorder.graphs == 2
    with torch.compiler.set_stance("force_eager"):
        assert relative_error(after, output(model)) < 1e-5


def test_fractions_are_counted_without_rounding_traps() -> None:
    assert [share_of(0.2, 30), share_of(0.29, 100), share_of(0.99, 100), share_of(0, 5)] == [6, 29, 99, 0]
    assert drop_branches(converted(), inputs_of(), fraction=0.49).dropped == []
    assert drop_branches(converted(), inputs_of()).dropped == []  # floor(0.2 * 2)
    once = converted()
    assert len(drop_branches(once, inputs_of(), fraction=0.99).dropped) == 1
    before = output(once)
    assert drop_branches(once, inputs_of(), fraction=0.99).dropped == []  # the last one stays
    assert torch.equal(output(once), before)


@pytest.mark.parametrize("fraction", [1.0, 1, -0.1, 1.5, "half", None, True, float("nan")])
def test_wrong_fractions(fraction: Any) -> None:
    model = converted()
    before = fingerprint(model)
    message = "detail and coherence" if fraction == 1 and fraction is not True else "fraction"
    with pytest.raises(ConfigError, match=message):
        drop_branches(model, inputs_of(), fraction=fraction)
    assert_unchanged(model, before)


def test_bad_input_leaves_the_model() -> None:
    model = converted()
    before = fingerprint(model)
    for wrong in ({"hidden_states": torch.zeros(3)}, {**inputs_of(), "hidden_states": torch.zeros(1, 5, 2, 14, 22)}, 3):
        with pytest.raises(InputsError):
            drop_branches(model, wrong, fraction=0.5)
    assert_unchanged(model, before)
    with pytest.raises(NotConvertedError):
        drop_branches(ALL_CASES["Wan"].build(), inputs_of())
    with pytest.raises(ConfigError, match="nothing to drop"):
        drop_branches(converted(linear_branch=False), inputs_of())
    with pytest.raises(WrappedModelError, match="distributed"):
        drop_branches(nn.DataParallel(model), inputs_of(), fraction=0.5)
    assert_unchanged(model, before)


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_file_remembers_what_was_dropped(dropped: nn.Module, tmp_path: Path) -> None:
    case = ALL_CASES["Wan"]
    path = salad_compile.save(dropped, tmp_path)
    names = set(load_file(path))
    assert not any(f"blocks.1.attn1.salad.{name}" in names for name in GONE)
    assert all(f"blocks.0.attn1.salad.{name}" in names for name in GONE)
    fresh = salad_compile.load(case.build(), path)
    expected = run(dropped, inputs_of(), case.output)
    assert_same(run(fresh, inputs_of(), case.output), expected, bound=0, gradient_bound=0)
    again = salad_compile.save(fresh, tmp_path / "again.safetensors")
    with safe_open(path, "pt") as one, safe_open(again, "pt") as other:
        assert one.metadata() == other.metadata()


def test_loading_into_a_converted_model_drops_there_too(dropped: nn.Module, tmp_path: Path) -> None:
    path = salad_compile.save(dropped, tmp_path)
    model = converted()
    salad_compile.load(model, path)
    assert torch.equal(output(model), output(dropped))
    assert [branch.record.dropped for branch in branches(model).values()] == [False, True]
    salad_compile.load(dropped, path)  # and once more, where it is dropped already


def test_a_damaged_file_drops_nothing(dropped: nn.Module, tmp_path: Path) -> None:
    path = salad_compile.save(dropped, tmp_path)
    with safe_open(path, "pt") as content:
        metadata = content.metadata()
    tensors = load_file(path)
    del tensors["blocks.1.attn1.salad.low_rank_out_up"]
    save_file(tensors, path, metadata=metadata)
    model = converted()
    before = fingerprint(model)
    with pytest.raises(salad_compile.MissingKeysError):
        salad_compile.load(model, path)
    assert_unchanged(model, before)
    assert not any(branch.record.dropped for branch in branches(model).values())


def test_what_is_dropped_does_not_come_back(dropped: nn.Module, tmp_path: Path) -> None:
    whole = salad_compile.save(converted(), tmp_path)
    before = fingerprint(dropped)
    with pytest.raises(AlreadyConvertedError, match=r"blocks\.1\.attn1.*base model"):
        salad_compile.load(dropped, whole)
    assert_unchanged(dropped, before)


def test_other_tools_go_on_with_a_dropped_model(dropped: nn.Module) -> None:
    sites = salad_compile.summary(dropped).sites
    assert [site.dropped for site in sites] == [False, True]
    assert sites[1].branch_parameters == sites[1].cost.projection == 0
    assert "dropped" in str(salad_compile.summary(dropped))
    assert "linear branch dropped" in repr(branches(dropped)["blocks.1.attn1.salad"])
    before = output(dropped)
    assert torch.equal(output(copy.deepcopy(dropped)), before)
    assert salad_compile.convert(dropped, dataclasses.replace(TINY)) is dropped
    assert salad_compile.explain(dropped, **inputs_of()).complete
    salad_compile.merge_lora(dropped)
    assert relative_error(output(dropped), before) < 1e-5
