"""Gradients of salad::block_sparse_attention."""

import pytest
import torch
import torch.nn.functional as F

from salad_compile.kernels import block_sparse_attention
from salad_compile.kernels.block_sparse import reference
from salad_compile.kernels.selection import Selection
from tests.kernels.helpers import ACCURACY, BLOCKS, LAYOUTS, LENGTHS, cosine, make_qkv, make_selection, relative_l2

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SCALE = 0.25


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("tokens", LENGTHS)
def test_equals_autograd_of_the_reference(tokens: int, blocks: tuple[int, int]) -> None:
    layout = LAYOUTS[tokens % len(LAYOUTS)]
    qkv = make_qkv(tokens, layout, grad=True)
    selection = make_selection(*qkv[:2], *blocks)
    out, _ = block_sparse_attention(*qkv, *selection, *blocks, SCALE)
    expected, _ = reference.block_sparse_attention(*qkv, Selection(*selection, *blocks, SCALE))
    grad = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(5))
    ours = torch.autograd.grad(out, qkv, grad)
    for grad_ours, grad_theirs in zip(ours, torch.autograd.grad(expected, qkv, grad), strict=True):
        torch.testing.assert_close(grad_ours, grad_theirs, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_do_not_matter(layout: str) -> None:
    qkv = make_qkv(203, layout, grad=True)
    selection = make_selection(*qkv[:2], 64, 64)
    out, lse = block_sparse_attention(*qkv, *selection, 64, 64, SCALE)
    grad = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(5))
    arguments = (*(x.detach() for x in (*qkv, out)), lse, *selection, 64, 64, SCALE)
    ours = torch.ops.salad.block_sparse_attention_backward(grad, *arguments)
    expected, _ = reference.block_sparse_attention(*qkv, Selection(*selection, 64, 64, SCALE))
    for grad_ours, grad_theirs in zip(ours, torch.autograd.grad(expected, qkv, grad), strict=True):
        torch.testing.assert_close(grad_ours, grad_theirs, rtol=1e-10, atol=1e-11)
        assert grad_ours.transpose(1, 2).is_contiguous()


@ACCURACY
def test_accuracy_bars(scale: float, dtype: torch.dtype) -> None:
    qkv = make_qkv(1023, dtype=dtype, head_dim=64, scale=scale, grad=True)
    selection = make_selection(*qkv[:2], 128, 64)
    mask = reference.token_mask(Selection(*selection, 128, 64, 0.125), 1023)
    wide = [x.detach().double().requires_grad_() for x in qkv]
    grad = torch.randn(qkv[0].shape, generator=torch.Generator().manual_seed(5)).to(dtype)
    out, _ = block_sparse_attention(*qkv, *selection, 128, 64, 0.125)
    expected, _ = reference.block_sparse_attention(*wide, Selection(*selection, 128, 64, 0.125))
    dense = F.scaled_dot_product_attention(*qkv, attn_mask=mask)
    for ours, exact, theirs in zip(
        torch.autograd.grad(out, qkv, grad),
        torch.autograd.grad(expected, wide, grad.double()),
        torch.autograd.grad(dense, qkv, grad),
        strict=True,
    ):
        assert ours.dtype == dtype
        assert cosine(ours, exact) >= 0.9999
        assert relative_l2(ours, exact) <= max(1e-2, 1.5 * relative_l2(theirs, exact))
        assert abs(float(ours.double().norm() / exact.norm()) - 1) <= 0.02


def test_gradcheck() -> None:
    qkv = make_qkv(37, batch=1, heads=2, head_dim=2, grad=True)
    selection = make_selection(*qkv[:2], 16, 16)
    assert torch.autograd.gradcheck(lambda *x: block_sparse_attention(*x, *selection, 16, 16, 0.5)[0], qkv)


def test_expanded_gradients() -> None:
    qkv = make_qkv(113, grad=True)
    selection = make_selection(*qkv[:2], 64, 64)
    out, _ = block_sparse_attention(*qkv, *selection, 64, 64, SCALE)
    expanded = torch.autograd.grad(out.sum(), qkv, retain_graph=True)  # the gradient of a sum has stride 0
    per_channel = torch.rand(16, dtype=torch.float64)
    rows = torch.autograd.grad((out * per_channel).sum(), qkv)
    expected, _ = reference.block_sparse_attention(*qkv, Selection(*selection, 64, 64, SCALE))
    for ours, theirs in zip(expanded, torch.autograd.grad(expected.sum(), qkv, retain_graph=True), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)
    for ours, theirs in zip(rows, torch.autograd.grad((expected * per_channel).sum(), qkv), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


def test_lse_is_not_differentiable() -> None:
    qkv = make_qkv(65, grad=True)
    selection = make_selection(*qkv[:2], 64, 64)
    out, lse = block_sparse_attention(*qkv, *selection, 64, 64, SCALE)
    assert out.requires_grad
    assert not lse.requires_grad


def test_rows_without_keys_get_zero_gradients() -> None:
    qkv = make_qkv(203, grad=True)
    lut, count = make_selection(*qkv[:2], 64, 64, 800)
    count = count.clone()
    count[:, :, 1] = 0
    count[:, :, 2] = 1
    out, _ = block_sparse_attention(*qkv, lut, count, 64, 64, SCALE)
    expected, _ = reference.block_sparse_attention(*qkv, Selection(lut, count, 64, 64, SCALE))
    grad = torch.randn_like(out)
    ours = torch.autograd.grad(out, qkv, grad)
    for grad_ours, grad_theirs in zip(ours, torch.autograd.grad(expected, qkv, grad), strict=True):
        torch.testing.assert_close(grad_ours, grad_theirs, rtol=1e-10, atol=1e-11)
    assert (ours[0][:, :, 64:128] == 0).all()
    assert (ours[0][:, :, :64].abs().sum(-1) > 0).all()


def test_keys_nobody_selects_get_zero_gradients() -> None:
    qkv = make_qkv(256, grad=True)
    lut = torch.arange(4, dtype=torch.int32).view(1, 1, 4, 1).expand(2, 3, 4, 1).clone()
    lut[:, :, 1] = 0  # block 1 attends to block 0, and nobody to block 1
    out, _ = block_sparse_attention(*qkv, lut, torch.ones(2, 3, 4).int(), 64, 64, SCALE)
    _, grad_key, grad_value = torch.autograd.grad(out, qkv, torch.randn_like(out))
    for grad in (grad_key, grad_value):
        assert (grad[:, :, 64:128] == 0).all()
        assert (grad[:, :, :64].abs().sum(-1) > 0).all()


def test_two_runs_are_bitwise_equal() -> None:
    qkv = make_qkv(1023, dtype=torch.float32, grad=True)
    selection = make_selection(*qkv[:2], 64, 64)
    grad = torch.randn(qkv[0].shape, generator=torch.Generator().manual_seed(5))

    def run() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(block_sparse_attention(*qkv, *selection, 64, 64, SCALE)[0], qkv, grad)

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("scale", [1.0, 16.0, 64.0])
def test_every_element_is_written_and_finite(scale: float) -> None:
    qkv = make_qkv(203, dtype=torch.float32, scale=scale, grad=True)
    selection = make_selection(*qkv[:2], 128, 64)
    out, _ = block_sparse_attention(*qkv, *selection, 128, 64, SCALE)
    grads = torch.autograd.grad(out, qkv, torch.ones_like(out))
    assert all(torch.isfinite(x).all() for x in grads)
