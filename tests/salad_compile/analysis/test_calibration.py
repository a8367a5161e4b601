"""Calibration: proposals from measurements that are checked by hand, set in place, kept in files; bad input changes
nothing."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import salad_compile
from salad_compile.analysis.calibration import SPARSITIES, calibrate, calibrate_heads
from salad_compile.analysis.diagnosis import diagnose
from salad_compile.errors import ConfigError, InputsError, NotConvertedError
from salad_compile.sites.branch import branches
from tests.models.registry import ALL_CASES
from tests.salad_compile.analysis.test_dropping import output, scaled
from tests.salad_compile.analysis.test_site_call import calls_of, converted, inputs_of
from tests.salad_compile.conversion.test_convert import assert_unchanged, fingerprint
from tests.support import TINY, randomise_branches, relative_error

BOTH = [inputs_of(), inputs_of(resolution=1)]


# --- the order of each head ------------------------------------------------------------------------------------------


class SpaceAndTime(nn.Module):
    """One layer, two heads: one attends to tokens of its frame, the other to tokens of its place in the frame.

    The input holds codes of the frame and of the place; queries and keys of a head are one of the two codes.
    """

    grid = (6, 5, 8)
    width = 16

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(self.width, self.width, bias=False) for _ in range(4))
        with torch.no_grad():
            self.q.weight.copy_(3 * torch.eye(self.width))
            self.k.weight.copy_(3 * torch.eye(self.width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (2, 8)).transpose(1, 2) for p in (self.q, self.k, self.v))
        out: Tensor = self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out

    @classmethod
    def inputs(cls) -> dict[str, Tensor]:
        frames, rows, columns = cls.grid
        code = torch.randn(frames + rows * columns, 8)
        code = code / code.norm(dim=-1, keepdim=True) * 2
        token = torch.arange(frames * rows * columns)
        frame, place = code[token // (rows * columns)], code[frames + token % (rows * columns)]
        return {"x": torch.cat([frame, place], dim=-1)[None]}


def windowed() -> tuple[nn.Module, dict[str, Tensor]]:
    model, inputs = SpaceAndTime(), SpaceAndTime.inputs()
    config = dataclasses.replace(TINY, pattern="stswa", sparsity=0.8, query_block=16)
    return salad_compile.convert(model, config, example_inputs=inputs, grid=SpaceAndTime.grid), inputs


@pytest.mark.parametrize("measure", ["error", "recall"])
def test_heads_get_the_order_in_which_they_are_local(measure: str) -> None:
    model, inputs = windowed()
    (branch,) = branches(model).values()
    for before in ([True, False], [False, True], [False, False]):
        branch.temporal_heads.copy_(torch.tensor(before))
        report = calibrate_heads(model, inputs, measure=measure)
        assert branch.temporal_heads.tolist() == [False, True]
        assert report.sites[0].before == tuple(before)
    recall = [head.recall for head in diagnose(model, inputs).calls[0].heads]
    assert min(recall) > 0.8
    branch.temporal_heads.logical_not_()
    assert max(head.recall for head in diagnose(model, inputs).calls[0].heads) < 0.5


def test_the_choice_is_the_lower_error_by_definition() -> None:
    model = converted(pattern="stswa")
    calls = calls_of(model, BOTH)
    report = calibrate_heads(model, BOTH)
    assert calibrate_heads(converted(pattern="stswa"), iter(BOTH)) == report
    expected: dict[str, list[Tensor]] = {}
    for call in calls:
        dense = call.dense().out.double()
        errors = [
            (call.sparse(tensors={"temporal_heads": torch.full((2,), through_time)}).out.double() - dense)
            .square()
            .sum(dim=(0, 2, 3))
            / dense.square().sum(dim=(0, 2, 3))
            for through_time in (False, True)
        ]
        expected.setdefault(call.branch.record.owner, []).append(torch.stack(errors))
    for site in report.sites:
        spatial, temporal = torch.stack(expected[site.name]).mean(dim=0).tolist()
        assert site.spatial == pytest.approx(spatial, rel=1e-6)
        assert site.temporal == pytest.approx(temporal, rel=1e-6)
        assert site.through_time == tuple(t < s for s, t in zip(spatial, temporal, strict=True))
        assert model.get_submodule(site.name).salad.temporal_heads.tolist() == list(site.through_time)
    assert any(site.through_time != site.before for site in report.sites)


def test_calibrated_heads_are_saved_and_compile_nothing_again(tmp_path: Path) -> None:
    model = converted(pattern="stswa")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="salad", options={"lowering": "eager"})
    before = output(compiled)
    with torch._dynamo.config.patch(error_on_recompile=True):
        calibrate_heads(compiled, BOTH)
        after = output(compiled)
    assert relative_error(after, output(model)) < 1e-5
    assert relative_error(after, before) > 1e-3
    loaded = salad_compile.load(ALL_CASES["Wan"].build(), salad_compile.save(model, tmp_path))
    assert torch.equal(output(loaded), output(model))
    for mine, theirs in zip(branches(model).values(), branches(loaded).values(), strict=True):
        assert torch.equal(mine.temporal_heads, theirs.temporal_heads)


def test_only_windows_have_heads_to_calibrate() -> None:
    mixed = converted(pattern="stswa", overrides={"blocks.1.*": {"pattern": "topk"}})
    report = calibrate_heads(mixed, inputs_of())
    assert [site.name for site in report.sites] == ["blocks.0.attn1"]
    assert "through time" in str(report)
    json.loads(report.to_json())
    model = converted()
    with pytest.raises(ConfigError, match="stswa"):
        calibrate_heads(model, inputs_of())
    with pytest.raises(ConfigError, match="'recall'"):
        calibrate_heads(mixed, inputs_of(), measure="recal")
    with pytest.raises(NotConvertedError):
        calibrate_heads(ALL_CASES["Wan"].build(), inputs_of())
    before = fingerprint(mixed)
    with pytest.raises(InputsError):
        calibrate_heads(mixed, [inputs_of(), {**inputs_of(), "hidden_states": torch.zeros(2)}])
    assert_unchanged(mixed, before)


# --- the sparsity of each site ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("measure", "target"), [("error", 0.3), ("recall", 0.5)])
@pytest.mark.parametrize("name", ["Wan", "CogVideoX"])
def test_the_highest_sparsity_within_the_target(name: str, measure: str, target: float) -> None:
    model = scaled(converted(name, lowest_sparsity=0.0), [0.1, 0.1])
    proposal = calibrate(model, inputs_of(name), target=target, measure=measure)
    assert 0 < proposal.sparsity < 0.95
    for call, site in zip(calls_of(model, inputs_of(name)), proposal.sites, strict=True):
        rows, dense, update = call.rows(), call.dense(), call.update()
        assert update is not None
        expected = []
        for sparsity in SPARSITIES:
            sparse = call.sparse(sparsity)
            if measure == "recall":
                expected.append(float((sparse.lse - dense.lse).exp().transpose(1, 2)[rows].mean()))
            else:
                out, reference = (t.transpose(1, 2)[rows].double() for t in (sparse.out + update, dense.out))
                expected.append(float((out - reference).abs().sum() / reference.abs().sum()))
        assert [value for _, value in site.curve] == pytest.approx(expected, rel=1e-5)
        good = [
            s for s, v in zip(SPARSITIES, expected, strict=True) if (v <= target if measure == "error" else v >= target)
        ]
        assert site.sparsity == max(good, default=0)
        assert site.value == dict(site.curve).get(site.sparsity)


def test_a_proposal_can_be_applied_or_converted_with() -> None:
    model = scaled(converted(lowest_sparsity=0.0), [0.2, 0.1])
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="salad", options={"lowering": "eager"})
    output(compiled)
    proposal = calibrate(compiled, BOTH, target=0.25)
    assert calibrate(model, BOTH, target=0.25) == proposal
    chosen = [site.sparsity for site in proposal.sites]
    assert len(set(chosen)) == 2, "one site would not tell the sites apart"
    assert [site.cost_now for site in proposal.sites] == [site.cost for site in salad_compile.summary(model).sites]
    with torch._dynamo.config.patch(error_on_recompile=True):
        proposal.apply(compiled)
        assert relative_error(output(compiled), output(model)) < 1e-5
    assert [branch.target_sparsity for branch in branches(model).values()] == pytest.approx(chosen)
    summary = salad_compile.summary(model).sites
    assert [site.target_sparsity for site in summary] == pytest.approx(chosen)
    assert [site.cost for site in proposal.sites] == [site.cost for site in summary]
    times = sum(site.cost.dense for site in summary) / sum(site.cost.salad for site in summary)
    assert f"{times:.2f} times fewer" in str(proposal).replace("\n", " ")
    config = dataclasses.replace(TINY, overrides=proposal.overrides)
    other = salad_compile.convert(ALL_CASES["Wan"].build(), config, example_inputs=inputs_of())
    randomise_branches(other)
    assert torch.equal(output(scaled(other, [0.2, 0.1])), output(model))
    with pytest.raises(ConfigError, match="lowest_sparsity"):
        proposal.apply(converted())


def test_a_site_that_no_sparsity_keeps_within_is_said_to_need_everything() -> None:
    model = scaled(converted(), [0.0, 0.0])
    proposal = calibrate(model, inputs_of(), target=1e-6)
    assert [(site.sparsity, site.within, site.value) for site in proposal.sites] == [(0.0, False, None)] * 2
    assert "none is within" in str(proposal)
    assert proposal.overrides == {f"blocks.{i}.attn1": {"sparsity": 0.0} for i in range(2)}
    json.loads(proposal.to_json())


def test_a_model_that_is_not_converted_is_measured_as_a_copy() -> None:
    model = ALL_CASES["Wan"].build()
    before = fingerprint(model)
    proposal = calibrate(model, BOTH, target=0.5, config=TINY, sparsities=[0.7, 0.3])
    assert_unchanged(model, before)
    expected = calibrate(scaled(converted(lora_rank=0), [0.0, 0.0]), BOTH, target=0.5, sparsities=[0.3, 0.7])
    for ours, theirs in zip(proposal.sites, expected.sites, strict=True):
        assert dataclasses.replace(ours, cost_now=theirs.cost_now, cost=theirs.cost) == theirs
        assert ours.cost.salad - ours.cost.lora == theirs.cost.salad  # the copy has low-rank updates, of zeros
    with pytest.raises(ConfigError, match="config="):
        calibrate(converted(), BOTH, target=0.5, config=TINY)
    with pytest.raises(salad_compile.NoEligibleSiteError, match="min_tokens"):
        calibrate(model, BOTH, target=0.5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"target": 0.0},
        {"target": -1},
        {"target": "low"},
        {"target": float("nan")},
        {"target": True},
        {"target": 1.5, "measure": "recall"},
        {"target": 0.1, "measure": "l1"},
        {"target": 0.1, "sparsities": []},
        {"target": 0.1, "sparsities": [0.5, 1.0]},
    ],
)
def test_wrong_budgets(wrong: dict[str, Any]) -> None:
    model = converted()
    before = fingerprint(model)
    with pytest.raises(ConfigError):
        calibrate(model, inputs_of(), **wrong)
    assert_unchanged(model, before)


def test_wrong_inputs_and_fixed_windows() -> None:
    model = converted()
    before = fingerprint(model)
    with pytest.raises(InputsError):
        calibrate(model, {**inputs_of(), "hidden_states": torch.zeros(2)}, target=0.5)
    with pytest.raises(InputsError, match="no inputs"):
        calibrate(model, [], target=0.5)
    assert_unchanged(model, before)
    with pytest.raises(ConfigError, match="window=None"):
        calibrate(converted(pattern="stswa", window=40), inputs_of(), target=0.5)
