"""summary, explain and the reports behind them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import salad_compile
from salad_compile.common.reports import fold
from salad_compile.errors import NotConvertedError
from salad_compile.kernels import repairs
from salad_compile.kernels.block_sparse import reference
from salad_compile.kernels.engines import Call, GateCall, register, unregister
from salad_compile.sites.branch import branches
from tests import toys
from tests.models.zoo import CASES
from tests.salad_compile.salad_files.test_salad_file import converted
from tests.support import TINY, relative_error

CASE = CASES["Wan"]


def test_summary_counts_what_was_added() -> None:
    model = converted()
    base = sum(p.numel() for p in CASE.build().parameters())
    summary = salad_compile.summary(model)
    assert summary.base_parameters == base
    width, rank = 24, 3
    assert summary.branch_parameters == 2 * (width * width + width + width + 1)
    assert summary.lora_parameters == 2 * 4 * 2 * width * rank
    assert [site.measured_sparsity for site in summary.sites] == [None, None]
    assert "not measured" in str(summary)
    cost = summary.sites[0].cost
    tokens, kept, heads, head_dim = 154, 10 * 300 // 1000, 2, 12
    assert cost.dense == 4 * tokens * tokens * heads * head_dim
    assert cost.sparse == 4 * tokens * kept * 16 * heads * head_dim
    assert cost.projection == 2 * tokens * width * width
    json.loads(summary.to_json())
    with pytest.raises(NotConvertedError):
        salad_compile.summary(CASE.build())


def test_sparsity_is_measured_by_running() -> None:
    for forward in ("eager", "explain"):
        model = converted()
        if forward == "eager":
            model(**CASE.inputs(0))
        else:
            explanation = salad_compile.explain(model, **CASE.inputs(0))
            assert explanation.measured_sparsity == pytest.approx(0.7, abs=0.02)
            assert explanation.engines == ("torch",)
            assert "on engine torch" in str(explanation)
        for site in salad_compile.summary(model).sites:
            # 3 of 10 blocks of 16 over 154 tokens, the last of 10 tokens
            assert 1 - 48 / 154 <= site.measured_sparsity <= 1 - 42 / 154
            assert site.engine == "torch"


def test_a_summary_after_compiled_runs_does_not_say_that_nothing_ran() -> None:
    model = converted()
    torch.compile(model, backend="salad", options={"lowering": "eager"})(**CASE.inputs(0))
    said = str(salad_compile.summary(model))
    assert "not measured" in said
    assert "compiled runs are not counted" in said
    salad_compile.explain(model, **CASE.inputs(0))
    assert "not measured" not in str(salad_compile.summary(model)).lower()


def test_explain_shows_every_call_with_its_fate() -> None:
    model = converted()
    model.blocks[0].compile(backend="salad", options={"lowering": "eager"})
    model(**CASE.inputs(0))
    compiled = model.blocks[0]._compiled_call_impl
    explanation = salad_compile.explain(model, **CASE.inputs(0))
    assert model.blocks[0]._compiled_call_impl is compiled
    assert explanation.complete
    assert explanation.executions == explanation.converted_sites == 2
    fates = {(row[1], row[3], row[4]) for row in explanation.rows()}
    assert fates == {
        *((f"blocks.{i}.attn1", "salad", "") for i in (0, 1)),
        *((f"blocks.{i}.attn2", "dense", "cross-attention") for i in (0, 1)),
    }
    assert json.loads(explanation.to_json())["complete"] is True
    assert explanation.to_markdown().count("\n| ") == 2 + len(explanation.rows())


def test_explain_names_lost_sites_without_raising() -> None:
    model = converted()
    model.blocks[1].attn1.to_q = torch.nn.Linear(24, 24)
    explanation = salad_compile.explain(model, **CASE.inputs(0))
    assert not explanation.complete
    assert "lost" in str(explanation)
    assert "blocks.1.attn1: its query projection did not run" in str(explanation)


def test_explain_of_an_unconverted_model() -> None:
    explanation = salad_compile.explain(toys.SelfAttention(), toys.tokens())
    assert (explanation.converted_sites, explanation.executions) == (0, 0)
    assert "fewer than min_tokens" in str(explanation)


def test_plan_reports_in_every_form() -> None:
    model = CASE.build()
    plan = salad_compile.plan(model, dict(CASE.inputs(0)), config=TINY)
    assert not branches(model)
    text = str(plan)
    assert "blocks.{0..1}.attn1" in text
    assert "cross-attention stays dense" in text
    assert len(plan.to_dict()["sites"]) == 4
    assert plan.to_markdown().count("| yes |") == 1
    assert json.loads(plan.to_json())["config"]["sparsity"] == TINY.sparsity


def test_plan_of_a_converted_model_is_that_of_its_base() -> None:
    inputs = dict(CASE.inputs(0))
    model = converted()
    before = model(**inputs).sample
    assert salad_compile.plan(model, inputs, config=TINY) == salad_compile.plan(CASE.build(), inputs, config=TINY)
    assert relative_error(model(**inputs).sample, before) == 0


def test_rows_are_folded_only_when_one_number_runs() -> None:
    rows = [(f"a.{i}.b", "x") for i in range(3)]
    assert fold(rows) == [("a.{0..2}.b", "x")]
    assert fold([*rows, ("a.5.b", "x")]) == [*rows, ("a.5.b", "x")]
    assert fold([("a.0.b", "x"), ("a.1.b", "y")]) == [("a.0.b", "x"), ("a.1.b", "y")]
    assert fold([("a.0.b.0", "x"), ("a.1.b.1", "x")]) == [("a.0.b.0", "x"), ("a.1.b.1", "x")]
    assert fold([("a", "x"), ("a", "x")]) == [("a", "x"), ("a", "x")]


class Definition:
    """An engine that computes the forward by the definition."""

    name = "definition"
    operators = ("block_sparse_attention",)

    def supports(self, call: Call) -> str | None:
        return None

    def run(self, call: Call, *arguments: Any) -> Any:
        return reference.block_sparse_attention(*arguments)

    def gate_calls(self, arch: int) -> tuple[GateCall, ...]:
        return ()


def test_an_engine_that_is_added_is_reported() -> None:
    model = converted()
    register(Definition(), before="torch")
    try:
        assert salad_compile.explain(model, **CASE.inputs(0)).engines == ("definition",)
        model(**CASE.inputs(0))
    finally:
        unregister("definition")
    assert {site.engine for site in salad_compile.summary(model).sites} == {"definition"}
    assert "definition" in str(salad_compile.summary(model))


def test_summary_shows_how_often_tiles_were_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    monkeypatch.setattr(repairs, "_redone", {device: torch.tensor([3, 2])})
    monkeypatch.setattr(repairs, "_tiles", {device: 1200})
    summary = salad_compile.summary(converted())
    assert "cuda:0: the Gluon forward computed 3 of 1,200 tiles again (0.250 %), in 2 calls" in str(summary)
    assert summary.to_dict()["repairs"] == {"cuda:0": {"redone": 3, "calls": 2, "tiles": 1200}}
