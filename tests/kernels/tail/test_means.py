"""The means of pools: against sums written out, with gradients."""

from __future__ import annotations

import pytest
import torch

from salad_compile.kernels import KernelArgumentError, pool_blocks, tail_means, take_rows, take_rows_with_means
from tests.kernels.helpers import make_qkv
from tests.kernels.tail.cases import means

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("pool", "begin", "end"), [(1, 0, 203), (4, 3, 200), (16, 0, 203), (64, 70, 203), (192, 0, 9)])
def test_means_and_their_gradients(pool: int, begin: int, end: int, masked: bool) -> None:
    valid = torch.ones(2, 203, dtype=torch.bool)
    valid[:, :begin] = valid[:, end:] = False
    mask = torch.rand(2, 203, generator=torch.Generator().manual_seed(1)) < 0.6 if masked else None
    kept = valid if mask is None else valid & mask
    x = make_qkv(203, "fused")[1].requires_grad_()
    ours, expected = tail_means(x, pool, begin, end, mask), means(x, pool, kept.to(x.dtype))
    torch.testing.assert_close(ours, expected)
    assert float(expected.detach().norm()) > 0
    grad = torch.randn(expected.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(*(torch.autograd.grad(out, x, grad)[0] for out in (ours, expected)))


@pytest.mark.parametrize("masked", [False, True])
def test_known_means_of_blocks_are_used(masked: bool) -> None:
    mask = torch.rand(2, 203, generator=torch.Generator().manual_seed(1)) < 0.6 if masked else None
    x = make_qkv(203, "fused")[1].requires_grad_()
    plain = tail_means(x, 64, 0, 203, mask)
    blocks = pool_blocks(x.detach(), 16, mask)
    known = tail_means(x, 64, 0, 203, mask, blocks, 16)
    torch.testing.assert_close(known, plain)
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), x)[0] for out in (known, plain)))
    assert not torch.equal(tail_means(x, 64, 0, 203, mask, blocks + 1, 16), known)


def test_16_bits_are_summed_in_32() -> None:
    x = (100 + torch.randn(1, 2, 512, 16, generator=torch.Generator().manual_seed(1))).bfloat16()
    exact = torch.unflatten(x.double(), 2, (2, 256)).mean(3)
    assert torch.equal(tail_means(x, 256, 0, 512), exact.bfloat16())


@pytest.mark.parametrize(("pool", "begin", "end"), [(1, 0, 203), (64, 70, 203), (192, 0, 150)])
def test_rows_that_are_moved_leave_their_means_with_gradients(pool: int, begin: int, end: int) -> None:
    x = make_qkv(203, "fused")[1].requires_grad_()
    order, inverse = permutation(203)
    ours = take_rows_with_means(x, order, inverse, pool, begin, end)
    moved = x[:, :, order.long()]
    valid = torch.zeros(2, 203, dtype=x.dtype)
    valid[:, begin:end] = 1
    expected = moved, means(moved, pool, valid)
    generator = torch.Generator().manual_seed(2)
    grads = [torch.randn(result.shape, dtype=x.dtype, generator=generator) for result in expected]
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(torch.autograd.grad(ours, x, grads), torch.autograd.grad(expected, x, grads))
    assert ours[0].stride() == take_rows(x, order, inverse).stride()


def permutation(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(3)).to(torch.int32)
    return order, order.argsort().to(torch.int32)


def test_wrong_arguments_are_refused() -> None:
    x = make_qkv(203)[1]
    order, inverse = permutation(203)
    for arguments, match in (
        ((order[1:], inverse, 64, 0, 203), "202 entries"),
        ((order, order, 64, 0, 203), "inverse"),
        ((order, inverse, 0, 0, 203), "pool"),
        ((order, inverse, 64, 0, 204), "within 203"),
    ):
        with pytest.raises(KernelArgumentError, match=match):
            take_rows_with_means(x, *arguments)
    for given, match in (((0, 0, 203), "pool"), ((64, 0, 204), "within 203"), ((64, 5, 4), "within 203")):
        with pytest.raises(KernelArgumentError, match=match):
            tail_means(x, *given)
    blocks = pool_blocks(x, 64)
    for pool, means_of, size, match in ((96, blocks, 64, "divide"), (64, blocks[:, :, 1:], 64, "blocks of 64")):
        with pytest.raises(KernelArgumentError, match=match):
            tail_means(x, pool, 0, 203, None, means_of, size)
    with pytest.raises(KernelArgumentError, match="key_mask"):
        tail_means(x, 64, 0, 203, torch.ones(2, 200, dtype=torch.bool))


def test_operator_passes_torchs_own_checks() -> None:
    x = make_qkv(130, dtype=torch.float32, grad=True)[1]
    torch.library.opcheck(torch.ops.salad.tail_means.default, (x, 64, 0, 130))
    torch.library.opcheck(torch.ops.salad.tail_means.default, (x, 16, 3, 100, torch.rand(2, 130) < 0.5))
    blocks = pool_blocks(x, 64)
    torch.library.opcheck(torch.ops.salad.tail_means.default, (x, 64, 0, 130, None, blocks, 64))
    torch.library.opcheck(torch.ops.salad.take_rows_with_means.default, (x, *permutation(130), 64, 0, 100))
    assert tail_means(x, 64, 0, 130, None, blocks, 64).data_ptr() != blocks.data_ptr()
