"""plan(): parameters, FLOPs and sparsity that it announces are those of the conversion."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import salad_compile
from salad_compile.sites.branch import branches
from tests.models.registry import ALL_CASES
from tests.support import TINY


@pytest.mark.parametrize("name", ["Wan", "HunyuanVideo", "CogVideoX"])
def test_the_plan_announces_what_the_conversion_adds(name: str) -> None:
    """Text is not sparse: rows of blocks that hold text see everything, and are seen by all."""
    case = ALL_CASES[name]
    model, inputs = case.build(), dict(case.inputs(0))
    planned = salad_compile.plan(model, inputs, config=TINY)
    salad_compile.convert(model, TINY, example_inputs=inputs)
    summary = salad_compile.summary(model)
    entries = {entry.name: entry for entry in planned.forecasts}
    assert planned.base_parameters == summary.base_parameters
    assert entries.keys() == {site.name for site in summary.sites}
    for site in summary.sites:
        entry = entries[site.name]
        assert (entry.branch_parameters, entry.lora_parameters) == (site.branch_parameters, site.lora_parameters)
        assert (entry.dense_flops, entry.salad_flops) == (site.cost.dense, site.cost.salad)
    with torch.no_grad():
        model(**inputs)
    for branch in branches(model).values():
        too_low = branch.measured_sparsity - entries[branch.record.owner].reachable
        assert -1e-9 < too_low < TINY.key_block / branch.record.tokens
    assert f"{summary.branch_parameters:,} of gates and projections" in planned.to_text(width=400)


def test_too_few_blocks_are_a_warning() -> None:
    case = ALL_CASES["Wan"]
    coarse = dataclasses.replace(TINY, sparsity=0.95, query_block=64, key_block=64)
    planned = salad_compile.plan(case.build(), dict(case.inputs(0)), config=coarse)
    assert all(entry.falls_short for entry in planned.forecasts)
    assert "cannot reach the sparsity 0.95 that is asked for, only " in planned.to_text(width=400)
    assert planned.to_dict()["forecasts"][0]["falls_short"]
    fine = dataclasses.replace(TINY, sparsity=0.5, query_block=16, key_block=16)
    planned = salad_compile.plan(case.build(), dict(case.inputs(0)), config=fine)
    assert not any(entry.falls_short for entry in planned.forecasts)
    assert "Warning" not in planned.to_text()
