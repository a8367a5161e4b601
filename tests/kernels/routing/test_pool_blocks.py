"""salad::pool_blocks against its definition."""

import pytest
import torch

from salad_compile.kernels import KernelArgumentError, pool_blocks
from salad_compile.kernels.routing import reference
from tests.kernels.helpers import LAYOUTS, LENGTHS, make_qkv

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", LENGTHS)
def test_equals_reference(tokens: int, layout: str) -> None:
    x, _, _ = make_qkv(tokens, layout)
    for block in (64, 128):
        expected = reference.pool_blocks(x, block)
        torch.testing.assert_close(pool_blocks(x, block), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_inputs_give_fp32_means(dtype: torch.dtype) -> None:
    x, _, _ = make_qkv(203, dtype=dtype)
    pooled = pool_blocks(x, 64)
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled.double(), reference.pool_blocks(x.double(), 64), rtol=1e-5, atol=1e-6)


def test_large_fp16_values_do_not_overflow() -> None:
    x = make_qkv(128, dtype=torch.float16)[0].abs() * 1000 + 30_000  # 64 of them exceed what fp16 can hold
    pooled = pool_blocks(x, 64)
    torch.testing.assert_close(pooled.double(), reference.pool_blocks(x.double(), 64), rtol=1e-5, atol=0)


def test_result_carries_no_gradient() -> None:
    x = make_qkv(65)[0].requires_grad_()
    assert not pool_blocks(x, 64).requires_grad


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.randn(2, 8, 4), 16), "4 dimensions"),
        ((torch.ones(1, 1, 8, 4, dtype=torch.int64), 16), "dtype"),
        ((torch.randn(1, 1, 8, 4), 0), "must be one of 16"),
        ((torch.randn(1, 1, 0, 4), 16), "no tokens"),
    ],
)
def test_rejects(arguments: tuple[torch.Tensor, int], message: str) -> None:
    with pytest.raises(KernelArgumentError, match=message):
        pool_blocks(*arguments)
