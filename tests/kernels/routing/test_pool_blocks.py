"""salad::pool_blocks against its definition."""

import pytest
import torch

from salad_compile.kernels import KernelArgumentError, pool_blocks
from salad_compile.kernels.routing import reference
from tests.kernels.helpers import LAYOUTS, LENGTHS, make_order, make_qkv


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("tokens", LENGTHS)
def test_equals_reference(tokens: int, ordered: bool, layout: str) -> None:
    x, _, _ = make_qkv(tokens, layout)
    order = make_order(tokens) if ordered else None
    for block in (64, 128):
        expected = reference.pool_blocks(x, order, block)
        torch.testing.assert_close(pool_blocks(x, order, block), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_inputs_give_fp32_means(dtype: torch.dtype) -> None:
    x, _, _ = make_qkv(203, dtype=dtype)
    pooled = pool_blocks(x, None, 64)
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled.double(), reference.pool_blocks(x.double(), None, 64), rtol=1e-5, atol=1e-6)


def test_large_fp16_values_do_not_overflow() -> None:
    x = make_qkv(128, dtype=torch.float16)[0].abs() * 1000 + 30_000  # 64 of them exceed what fp16 can hold
    pooled = pool_blocks(x, None, 64)
    torch.testing.assert_close(pooled.double(), reference.pool_blocks(x.double(), None, 64), rtol=1e-5, atol=0)


def test_order_is_a_gather() -> None:
    x, _, _ = make_qkv(203)
    order = make_order(203)
    assert torch.equal(pool_blocks(x, order, 64), pool_blocks(x[:, :, order.long()], None, 64))
    assert not torch.allclose(pool_blocks(x, order, 64), pool_blocks(x, None, 64))


def test_result_carries_no_gradient() -> None:
    x = make_qkv(65)[0].requires_grad_()
    assert not pool_blocks(x, None, 64).requires_grad


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.randn(2, 8, 4), None, 4), "4 dimensions"),
        ((torch.ones(1, 1, 8, 4, dtype=torch.int64), None, 4), "dtype"),
        ((torch.randn(1, 1, 8, 4), None, 0), "at least 1"),
        ((torch.randn(1, 1, 0, 4), None, 4), "no tokens"),
        ((torch.randn(1, 1, 8, 4), torch.arange(8), 4), "int32"),
        ((torch.randn(1, 1, 8, 4), torch.arange(7).int(), 4), "7 entries"),
        ((torch.randn(1, 1, 8, 4), torch.arange(1, 9).int(), 4), "outside"),
        ((torch.randn(1, 1, 8, 4), torch.zeros(8).int(), 4), "permutation"),
        ((torch.randn(1, 1, 8, 4), torch.zeros(2, 4).int(), 4), "1 dimension"),
    ],
)
def test_rejects(arguments: tuple[torch.Tensor, torch.Tensor | None, int], message: str) -> None:
    with pytest.raises(KernelArgumentError, match=message):
        pool_blocks(*arguments)
