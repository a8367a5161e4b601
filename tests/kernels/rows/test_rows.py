"""`salad::take_rows`: values, gradients, and that a compiled one is gathers in both directions."""

from __future__ import annotations

import pytest
import torch

from salad_compile.kernels.errors import KernelArgumentError
from salad_compile.kernels.rows import decompositions, take_rows
from tests.support import seeded

S = 37


def operands(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    with seeded(5):
        x = torch.randn(2, S, 3, 8, dtype=dtype).transpose(1, 2)
        order = torch.randperm(S)
    return x, order.int(), order.argsort().int()


def test_rows_and_gradients() -> None:
    x, order, inverse = operands()
    out = take_rows(x.requires_grad_(), order, inverse)
    assert torch.equal(out, x[:, :, order.long()])
    assert out.stride() == x.stride()
    weights = torch.randn(out.shape, dtype=out.dtype)
    (gradient,) = torch.autograd.grad((out * weights).sum(), x)
    assert torch.equal(gradient[:, :, order.long()], weights)
    assert torch.equal(take_rows(out, inverse, order), x)


def test_opcheck() -> None:
    x, order, inverse = operands(torch.float32)
    torch.library.opcheck(torch.ops.salad.take_rows.default, (x.requires_grad_(), order, inverse))


def test_the_decomposition_is_the_operator() -> None:
    x, order, inverse = operands()
    (decomposed,) = decompositions().values()
    assert torch.equal(decomposed(x, order, inverse), take_rows(x, order, inverse))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, order: (x[0], order), "4 dimensions"),
        (lambda x, order: (x, order.long()), "int32"),
        (lambda x, order: (x, order[:-1]), "36 entries"),
        (lambda x, order: (x, order * 0), "not a permutation"),
    ],
)
def test_wrong_arguments(change: object, message: str) -> None:
    x, order, inverse = operands()
    x, order = change(x, order)  # type: ignore[operator]
    with pytest.raises(KernelArgumentError, match=message):
        take_rows(x, order, inverse)
