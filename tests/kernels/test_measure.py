"""measure_executions counts what block-sparse attention computed (specification 4.5)."""

import pytest
import torch

from salad_compile.kernels import Execution, block_sparse_attention, measure, measure_executions
from salad_compile.kernels.block_sparse import reference
from salad_compile.kernels.measure import capture_selections
from salad_compile.kernels.selection import Selection
from tests.kernels.helpers import BLOCKS, make_qkv, make_selection


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("tokens", [1, 65, 203, 640])
def test_counts_the_true_entries_of_the_mask(tokens: int, blocks: tuple[int, int]) -> None:
    qkv = make_qkv(tokens)
    lut, count = make_selection(*qkv[:2], *blocks)
    count = count.clone()
    count[0, 0] -= 1
    with measure_executions() as executions:
        block_sparse_attention(*qkv, lut, count, *blocks, 0.25)
    mask = reference.token_mask(Selection(lut, count, *blocks, 0.25), tokens)
    total = int(mask.any(-1).sum()) * tokens  # query blocks without keys are another process's
    assert executions == [Execution(int(mask.sum()), total, "torch")]


def test_contexts_nest_and_end() -> None:
    qkv = make_qkv(65)
    arguments = (*qkv, *make_selection(*qkv[:2], 64, 64), 64, 64, 0.25)
    with measure_executions() as outer:
        block_sparse_attention(*arguments)
        with measure_executions() as inner:
            block_sparse_attention(*arguments)
        block_sparse_attention(*arguments)
    block_sparse_attention(*arguments)
    assert (len(outer), len(inner)) == (3, 1)


def test_selections_are_captured_as_they_were_given_and_with_the_lse() -> None:
    qkv = make_qkv(65)
    selection = make_selection(*qkv[:2], 64, 64)
    with capture_selections() as captured:
        _, lse = block_sparse_attention(*qkv, *selection, 64, 64, 0.25)
        with capture_selections() as inner:
            pass
    block_sparse_attention(*qkv, *selection, 64, 64, 0.25)
    assert inner == []
    (seen,) = captured
    for tensor, expected in zip((*seen.selection[:2], seen.lse), (*selection, lse), strict=True):
        assert torch.equal(tensor, expected)
    assert seen.selection[2:] == (64, 64, 0.25, None)


def test_backward_is_not_counted() -> None:
    qkv = make_qkv(65, grad=True)
    arguments = (*qkv, *make_selection(*qkv[:2], 64, 64), 64, 64, 0.25)
    with measure_executions() as executions:
        block_sparse_attention(*arguments)[0].sum().backward()
    assert len(executions) == 1


def test_sees_calls_inside_compiled_graphs() -> None:
    qkv = make_qkv(203)
    selection = make_selection(*qkv[:2], 64, 64)
    compiled = torch.compile(
        lambda *x: block_sparse_attention(*x, 64, 64, 0.25)[0] + 1, backend="aot_eager", fullgraph=True
    )
    compiled(*qkv, *selection)
    with measure_executions() as executions:
        compiled(*qkv, *selection)
        compiled(*qkv, *selection)
    assert len(executions) == 2
    assert 0 < executions[0].computed_pairs < executions[0].total_pairs == 2 * 3 * 203 * 203


def test_costs_nothing_when_not_active(monkeypatch: pytest.MonkeyPatch) -> None:
    def counted(*args: object) -> int:
        raise AssertionError("counted although nobody asked")

    monkeypatch.setattr(measure, "block_count", counted)
    qkv = make_qkv(65)
    arguments = (*qkv, *make_selection(*qkv[:2], 64, 64), 64, 64, 0.25)
    block_sparse_attention(*arguments)
    with measure_executions(), pytest.raises(AssertionError, match="nobody asked"):
        block_sparse_attention(*arguments)
