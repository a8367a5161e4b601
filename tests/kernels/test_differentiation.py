"""Forward-mode and double differentiation of the operators are errors of ours, and never zero tangents."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from salad_compile.kernels.differentiation import in_forward_mode
from salad_compile.kernels.errors import KernelDifferentiationError

SALAD = torch.ops.salad


def attend(query: Tensor) -> Tensor:
    lut = torch.zeros(1, 1, 2, 1, dtype=torch.int32)
    count = torch.full((1, 1, 2), -1, dtype=torch.int32)
    out: Tensor = SALAD.block_sparse_attention(query, query.flip(2), query + 1, lut, count, 16, 16, 0.3)[0]
    return out


def attend_with_tail(query: Tensor) -> Tensor:
    lut = torch.zeros(1, 1, 2, 1, dtype=torch.int32)
    count = torch.ones(1, 1, 2, dtype=torch.int32)
    pools, counted = (query[:, :, :2], query[:, :, 2:4]), torch.ones(1, 1, 2, 2)
    given = (query, query.flip(2), query + 1, *pools, counted, None, lut, count, 16, 16, 0.3)
    out: Tensor = SALAD.attend_with_tail(*given)[0]
    return out


def rows(x: Tensor) -> Tensor:
    order = torch.arange(32, dtype=torch.int32).flip(0)
    out: Tensor = SALAD.take_rows(x, order, order)
    return out


def dual(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    with forward_ad.dual_level():
        function(forward_ad.make_dual(x, torch.ones_like(x)))


def jvp(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    torch.func.jvp(function, (x,), (torch.ones_like(x),))


@pytest.mark.parametrize("way", [dual, jvp])
@pytest.mark.parametrize("function", [attend, attend_with_tail, rows])
def test_forward_mode_is_refused(way: Callable[..., None], function: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(1, 1, 32, 8)
    assert not in_forward_mode()
    with pytest.raises(KernelDifferentiationError, match="no forward-mode derivative"):
        way(function, x)
    function(x)


def test_gradients_of_gradients_are_refused() -> None:
    x = torch.randn(1, 1, 32, 8, requires_grad=True)
    for function in (attend, attend_with_tail):
        (gradient,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
        with pytest.raises(KernelDifferentiationError, match="gradients of gradients"):
            gradient.sum().backward()
    (gradient,) = torch.autograd.grad(rows(x).pow(2).sum(), x, create_graph=True)
    assert torch.equal(torch.autograd.grad(gradient.sum(), x)[0], torch.full_like(x, 2))  # rows can
