"""Operators at the edge, on the engine for the CPU; tests/kernels/gpu has the same of Triton."""

from __future__ import annotations

import pytest
import torch

from salad_compile.kernels import take_rows
from salad_compile.kernels.errors import KernelArgumentError
from tests.kernels import edges


@pytest.mark.parametrize("bad", edges.BAD)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_what_is_masked_never_arrives(bad: float, dtype: torch.dtype) -> None:
    edges.check_attention(bad, "cpu", dtype)
    for feature_map in ("relu", "elu", "softmax"):
        edges.check_pooling_and_state(bad, "cpu", dtype, feature_map)


@pytest.mark.parametrize("feature_map", ["relu", "elu", "softmax"])
def test_fp16_sums_do_not_overflow(feature_map: str) -> None:
    edges.check_fp16_state("cpu", feature_map)


def test_offsets_beyond_32_bits() -> None:
    edges.check_far_strides("cpu", torch.float32)


def test_block_sizes_of_the_readme() -> None:
    edges.check_block_sizes("cpu")


def test_rows_need_the_inverse_of_their_order() -> None:
    x, order = torch.randn(1, 2, 50, 4), torch.randperm(50).int()
    inverse = order.argsort().int()
    assert torch.equal(take_rows(take_rows(x, order, inverse), inverse, order), x)
    for wrong in (order if not torch.equal(order, inverse) else order.roll(1), inverse.roll(1), torch.arange(50).int()):
        with pytest.raises(KernelArgumentError, match="not the inverse of order"):
            take_rows(x, order, wrong)


def test_an_inverse_is_read_again_after_a_write() -> None:
    x, order = torch.randn(1, 1, 50, 2), torch.randperm(50).int()
    inverse = order.argsort().int()
    for _ in range(2):
        take_rows(x, order, inverse)
    order.copy_(order.roll(1))
    with pytest.raises(KernelArgumentError, match="not the inverse of order"):
        take_rows(x, order, inverse)
