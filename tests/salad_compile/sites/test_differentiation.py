"""A converted model under forward-mode or double differentiation: an error of ours, compiled too."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

import salad_compile
from salad_compile.errors import DifferentiationError
from salad_compile.kernels.errors import KernelDifferentiationError
from tests import toys
from tests.support import TINY, randomise_branches

X = toys.tokens(100)


def model() -> torch.nn.Module:
    converted = salad_compile.convert(toys.SelfAttention(), TINY, example_inputs=(X,))
    randomise_branches(converted)
    return converted


def test_uncompiled() -> None:
    converted = model()
    with pytest.raises(DifferentiationError, match="set_dense"):
        torch.func.jvp(converted, (X,), (X,))
    with forward_ad.dual_level(), pytest.raises(DifferentiationError, match="the converted site ''"):
        converted(forward_ad.make_dual(X, X))
    x = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(converted(x).sum(), x, create_graph=True)
    with pytest.raises(KernelDifferentiationError, match="gradients of gradients"):
        gradient.sum().backward()


@pytest.mark.parametrize("lowering", ["eager", "aot_eager"])
def test_compiled(lowering: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(model(), backend="salad", options={"lowering": lowering})
    with forward_ad.dual_level(), pytest.raises(KernelDifferentiationError, match="no forward-mode derivative"):
        compiled(forward_ad.make_dual(X, X))
    with pytest.raises(DifferentiationError):
        torch.func.jvp(compiled, (X,), (X,))
