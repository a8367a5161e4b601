"""Facts about contents hold for one tensor, until something writes into it."""

from __future__ import annotations

import pytest
import torch

from salad_compile.kernels import block_sparse_attention, remembered, select_blocks, take_rows
from salad_compile.kernels.errors import KernelArgumentError
from salad_compile.kernels.remembered import fact_of, remember


def test_a_write_ends_what_is_known() -> None:
    x = torch.zeros(3)
    assert fact_of(x) is None
    remember(x, "zeros")
    assert fact_of(x) == "zeros"
    assert fact_of(x.clone()) is None
    assert fact_of(x.view(3)) is None
    x[1] = 1
    assert fact_of(x) is None


def test_a_later_tensor_with_the_same_number_is_not_known() -> None:
    x = torch.zeros(3)
    remember(x, "zeros")
    y = torch.ones(3)
    remembered._entries[id(y)] = remembered._entries[id(x)]
    assert fact_of(y) is None


def test_tensors_whose_writes_are_not_counted_are_never_known() -> None:
    with torch.inference_mode():
        x = torch.zeros(3)
        remember(x, "zeros")
        assert fact_of(x) is None


def test_it_does_not_grow_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "_MOST", 4)
    kept = [torch.zeros(1) for _ in range(9)]
    for x in kept:
        remember(x, "zero")
    assert len(remembered._entries) <= 4
    assert fact_of(kept[-1]) == "zero"


def test_an_order_is_checked_again_after_a_write() -> None:
    x = torch.randn(1, 1, 3, 2)
    order, inverse = (torch.tensor(rows, dtype=torch.int32) for rows in ([2, 0, 1], [1, 2, 0]))
    for _ in range(2):
        take_rows(x, order, inverse)
    order[0] = 0
    with pytest.raises(KernelArgumentError, match="permutation"):
        take_rows(x, order, inverse)


def _selected() -> tuple[torch.Tensor, torch.Tensor]:
    pooled = torch.randn(1, 1, 4, 2)
    lut, count = select_blocks(pooled, pooled, 2, 2, 500)
    return lut, count


def test_lists_of_blocks_are_checked_unless_they_belong_together() -> None:
    q = torch.randn(1, 1, 64, 2)
    lut, count = _selected()
    block_sparse_attention(q, q, q, lut, count, 16, 16, 1.0)
    other = torch.full_like(count, 3)
    with pytest.raises(KernelArgumentError, match="count"):
        block_sparse_attention(q, q, q, lut, other, 16, 16, 1.0)
    lut[..., 0] = 4
    with pytest.raises(KernelArgumentError, match="lut"):
        block_sparse_attention(q, q, q, lut, count, 16, 16, 1.0)


def test_lists_for_more_blocks_are_checked() -> None:
    pooled = torch.randn(1, 1, 4, 2)
    lut, count = select_blocks(pooled, pooled, 16, 16, 1000)
    q = torch.randn(1, 1, 64, 2)
    block_sparse_attention(q, q, q, lut, count, 16, 16, 1.0)
    with pytest.raises(KernelArgumentError):
        block_sparse_attention(q[:, :, :48], q[:, :, :48], q[:, :, :48], lut[:, :, :3], count[:, :, :3], 16, 16, 1.0)
