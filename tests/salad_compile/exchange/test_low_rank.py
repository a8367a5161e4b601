"""The pairs that are exported multiply out to the update that the branch applies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor

import salad_compile
from salad_compile.common.sharding import whole_state
from salad_compile.exchange.low_rank import LowRank, low_rank_updates, split_fused
from salad_compile.salad_files.contents import branch_state
from salad_compile.sites.branch import branches
from tests.models.zoo import CASES
from tests.support import TINY, converted, randomise_branches


def updates_of(model: nn.Module) -> list[LowRank]:
    return low_rank_updates(model, whole_state(branch_state(model)))


def applied(model: nn.Module, update: LowRank) -> Tensor:
    """The matrix that the branch's hook adds to the projection's output, read off one unit vector at a time."""
    branch = next(b for b in branches(model).values() if b.record.owner == update.owner)
    first = next(role for role, name in branch.record.projections().items() if name == update.name)
    linear: Any = model.get_submodule(update.name)
    with torch.no_grad():
        unit = torch.eye(linear.in_features)
        return branch.add_updates(first, unit, torch.zeros(linear.in_features, linear.out_features)).T


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Wan", {"lora_alpha": 5.0}),
        ("handwritten_fused", {"lora_alpha": 5.0}),
        ("handwritten_fused", {"lora_targets": ("query", "value", "out")}),
    ],
)
def test_a_pair_is_what_the_branch_applies(name: str, changes: dict[str, Any]) -> None:
    model = converted(CASES[name], **changes)
    updates = updates_of(model)
    assert {update.name for update in updates if update.owner == CASES[name].sites[0]} == set(
        CASES[name].projections.values()
    )
    for update in updates:
        expected = applied(model, update)
        assert expected.norm() > 1e-2
        down, up = update.pair()
        assert down.shape == (update.rank, expected.shape[1])
        assert up.shape == (expected.shape[0], update.rank)
        # fp32 products of rank 3: the order of a few roundings
        torch.testing.assert_close(up @ down, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(update.update(), expected, rtol=1e-5, atol=1e-6)


def test_a_fused_projection_is_one_pair_of_the_sum_of_ranks_with_b_block_diagonal() -> None:
    update = updates_of(converted(CASES["handwritten_fused"]))[0]
    assert update.roles == ("query", "key", "value")
    assert update.rank == 9
    _, up = update.pair()
    rows = up.shape[0] // 3
    for at in range(3):
        block = up[at * rows : (at + 1) * rows]
        assert block[:, 3 * at : 3 * at + 3].all()
        assert block.count_nonzero() == 3 * rows


def test_factors_keep_their_dtype_and_are_rounded_once() -> None:
    model = converted(CASES["Wan"], lora_alpha=5.0).to(torch.bfloat16)
    update = updates_of(model)[0]
    _, up = update.pair()
    stored = update.parts[0].up
    assert stored is not None
    assert up.dtype == torch.bfloat16
    scale = float(next(iter(branches(model).values())).low_rank_scale)  # .to() rounds buffers too
    assert scale == pytest.approx(5 / 3, rel=2**-8)
    assert torch.equal(up, (stored.float() * scale).to(torch.bfloat16))


def test_projections_that_diffusers_fused_go_by_the_names_of_a_fresh_model() -> None:
    case = CASES["Wan"]
    fused: Any = case.build()
    fused.fuse_qkv_projections()
    salad_compile.convert(fused, TINY, example_inputs=dict(case.inputs(0)))
    randomise_branches(fused)
    updates = updates_of(fused)
    assert updates[0].name == "blocks.0.attn1.to_qkv"
    apart = split_fused(fused, updates)
    assert [update.name for update in apart[:4]] == list(case.projections.values())
    torch.testing.assert_close(torch.cat([update.update() for update in apart[:3]]), updates[0].update())
