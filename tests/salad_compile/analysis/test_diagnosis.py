"""diagnose: every number by hand from full matrices in fp64, the same on every run, in every form of a report."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

import salad_compile
from salad_compile.analysis.diagnosis import diagnose, distance, ratio
from salad_compile.errors import ConfigError, InputsError, NotConvertedError
from tests.models.registry import ALL_CASES
from tests.salad_compile.analysis.test_dropping import scaled
from tests.salad_compile.analysis.test_site_call import (
    CALLS,
    calls_of,
    computed_pairs,
    converted,
    inputs_of,
    softmax_matrix,
)
from tests.salad_compile.conversion.test_convert import assert_unchanged, fingerprint


def by_hand(out: Tensor, dense: Tensor) -> dict[str, float]:
    """Of one head: fp64 (rows, D)."""
    return {
        "l1": float((out - dense).abs().sum() / dense.abs().sum()),
        "cosine": float(torch.nn.functional.cosine_similarity(out.flatten(), dense.flatten(), dim=0)),
    }


@pytest.mark.parametrize(("name", "changes"), CALLS, ids=["topk", "stswa", "joint", "masked", "prefix"])
def test_every_number_by_hand(name: str, changes: dict[str, Any]) -> None:
    model = converted(name, **changes)
    call = calls_of(model, inputs_of(name))[0]
    measured = diagnose(model, inputs_of(name)).calls[0]
    assert (measured.name, measured.step) == (call.branch.record.owner, 0)
    weights, value, rows = softmax_matrix(call), call.given.value.double(), call.rows()
    kept = weights * computed_pairs(call, call.sparse(), call.given.branch.get("temporal_heads"))
    update, gate = call.update(), call.gate()
    assert update is not None
    assert gate is not None
    for number, head in enumerate(measured.heads):
        one_dense, one_kept = (t[:, number][rows] for t in (weights, kept))
        assert rows.shape[0] == 1  # so that rows of one sample can be multiplied with its values
        dense, mass = one_dense @ value[0, number], one_kept.sum(dim=-1, keepdim=True)
        sparse = one_kept @ value[0, number] / mass
        added = update[:, number][rows].double()
        for out, l1, cosine in (
            (sparse, head.sparse_l1, head.sparse_cosine),
            (sparse + added, head.salad_l1, head.salad_cosine),
        ):
            expected = by_hand(out, dense)
            assert l1 == pytest.approx(expected["l1"], rel=1e-4)
            assert cosine == pytest.approx(expected["cosine"], rel=1e-4)
        assert head.recall == pytest.approx(float(mass.mean()), rel=1e-4)
        assert head.gate == pytest.approx(float(gate.double().mean()), rel=1e-5)
        assert head.contribution == pytest.approx(float(added.norm() / sparse.norm()), rel=1e-4)


def test_at_sparsity_zero_all_is_there() -> None:
    for call in diagnose(scaled(converted(sparsity=0.0), [0.0, 0.0]), inputs_of()).calls:
        for head in call.heads:
            assert head.recall == pytest.approx(1, abs=1e-6)
            assert max(head.sparse_l1, head.salad_l1) < 1e-5
            assert head.salad_cosine == pytest.approx(1, abs=1e-9)
            assert head.contribution == 0


def test_two_runs_and_compiled_models_give_the_same() -> None:
    model = converted("HunyuanVideo").train()
    inputs = [inputs_of("HunyuanVideo"), inputs_of("HunyuanVideo", 1)]
    before = fingerprint(model)
    first = diagnose(model, inputs)
    assert diagnose(model, iter(inputs)) == first
    assert_unchanged(model, before)
    assert model.training
    assert diagnose(torch.compile(model, backend="salad"), tuple(inputs)) == first


def test_sites_without_a_gate_or_a_linear_branch() -> None:
    model = converted(gate="none", overrides={"blocks.1.*": {"linear_branch": False}})
    with_branch, without = diagnose(model, inputs_of()).calls
    assert with_branch.mean("gate") is without.mean("gate") is None
    assert with_branch.contribution > 0
    assert without.contribution == 0
    assert [head.salad_l1 for head in without.heads] == [head.sparse_l1 for head in without.heads]
    assert diagnose(model, inputs_of()).rows()[1][-2:] == ("none", "0.000")


def test_the_report_in_every_form() -> None:
    diagnosis = diagnose(converted(), [inputs_of(), inputs_of(resolution=1)])
    assert [len(diagnosis.by(detail).rows()) for detail in ("site", "head", "step")] == [2, 4, 4]
    assert all(len(row) == len(diagnosis.columns) for row in diagnosis.rows())
    recalls = [call.mean("recall") for call in diagnosis.sites["blocks.1.attn1"]]
    assert diagnosis.rows()[1][3] == f"{sum(r for r in recalls if r is not None) / 2:.3f}"
    first = json.loads(diagnosis.to_json())["calls"][0]
    assert (first["name"], first["step"], len(first["heads"])) == ("blocks.0.attn1", 0, 2)
    assert "| blocks.0.attn1 | 1 | all |" in diagnosis.by("head").to_markdown()
    assert "2 sites, 2 forwards" in str(diagnosis)
    with pytest.raises(ConfigError, match="'layer'"):
        diagnosis.by("layer")


def test_a_batch_counts_all_its_samples() -> None:
    model, two = converted(), inputs_of()
    two = {name: torch.cat([t, t.flip(-1)]) if t.dim() > 1 else t.expand(2) for name, t in two.items()}
    parts = [{name: t[i : i + 1] for name, t in two.items()} for i in range(2)]
    whole, single = diagnose(model, two).calls[0], [diagnose(model, part).calls[0] for part in parts]
    for head in range(2):
        expected = sum(call.heads[head].recall for call in single) / 2
        assert whole.heads[head].recall == pytest.approx(expected, rel=1e-5)
    assert single[0].heads[0].recall != pytest.approx(single[1].heads[0].recall, rel=1e-3)


def test_nothing_compared_with_nothing_is_no_difference() -> None:
    zero = torch.zeros(1, 2, 3, 4)
    rows = torch.ones(1, 3, dtype=torch.bool)
    assert distance(zero, zero, rows).relative_l1.tolist() == [0, 0]
    assert ratio(torch.tensor(1.0), torch.tensor(0.0)) == float("inf")


def test_bad_input() -> None:
    model = converted()
    before = fingerprint(model)
    with pytest.raises(InputsError, match="Give inputs as one denoising step"):
        salad_compile.diagnose(model, {**inputs_of(), "encoder_hidden_states": torch.zeros(1, 17, 3)})
    with pytest.raises(InputsError, match="hidden_states"):
        salad_compile.diagnose(model, {})
    with pytest.raises(NotConvertedError):
        salad_compile.diagnose(ALL_CASES["Wan"].build(), inputs_of())
    assert_unchanged(model, before)
