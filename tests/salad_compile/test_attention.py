"""The definition, against formulas written out in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from salad_compile.attention import LINEAR_EPS, BranchTensors, Segments, salad_attention, sparse_attention
from salad_compile.config import AttentionSpec, SaladConfig

from ..support import relative_error, seeded

B, H, S, D, C = 2, 3, 77, 8, 20


def spec(sparsity: float) -> AttentionSpec:
    return SaladConfig(sparsity=sparsity, query_block=32, key_block=16).spec


def operands(scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor, BranchTensors]:
    with seeded(3):
        q, k, v = torch.randn(3, B, S, H, D, dtype=torch.float64).transpose(2, 3).unbind(0)
        x = torch.randn(B, S, C, dtype=torch.float64)
        shapes = ((C,), (1,), (H * D, H * D), (H * D,))
        branch = BranchTensors(*(torch.randn(shape, dtype=torch.float64) * 0.3 for shape in shapes))
    return q * scale, k * scale, v, x, branch


def salad(*arguments: object, sparsity: float = 0.5, dtype: torch.dtype = torch.float64) -> Tensor:
    q, k, v, x, branch = arguments
    return salad_attention(q, k, v, x, branch, None, spec(sparsity), scale=D**-0.5, dtype=dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", [1.0, 4.0, 16.0])
def test_the_sum_of_the_paper(scale: float) -> None:
    """O' = O_s + sigmoid(x w + b) Proj(O_l), with O_l as the naive sum over all pairs."""
    q, k, v, x, branch = operands(scale)
    weights = q.relu() @ k.relu().transpose(-1, -2)
    linear = weights @ v / (weights.sum(-1, keepdim=True) + LINEAR_EPS)
    projected = linear.transpose(1, 2).flatten(2) @ branch.proj_weight.T + branch.proj_bias
    gate = 1 / (1 + torch.exp(-(x @ branch.gate_weight + branch.gate_bias)))
    update = (gate.unsqueeze(-1) * projected).unflatten(-1, (H, D)).transpose(1, 2)
    expected = sparse_attention(q, k, v, Segments(0, 0, 0, S), spec(0.5), D**-0.5) + update
    assert relative_error(salad(q, k, v, x, branch), expected) < 1e-12


def test_invariants_of_the_specification() -> None:
    q, k, v, x, branch = operands()
    zero = branch._replace(proj_weight=branch.proj_weight * 0, proj_bias=branch.proj_bias * 0)
    assert torch.equal(salad(q, k, v, x, zero), sparse_attention(q, k, v, Segments(0, 0, 0, S), spec(0.5), D**-0.5))
    assert relative_error(salad(q, k, v, x, zero, sparsity=0.0), F.scaled_dot_product_attention(q, k, v)) < 1e-12


def test_an_unbatched_gate_input_is_one_sample() -> None:
    q, k, v, x, branch = operands()
    q, k, v = q[:1], k[:1], v[:1]
    assert torch.equal(salad(q, k, v, x[0], branch), salad(q, k, v, x[:1], branch))


def test_the_result_has_the_dtype_of_what_it_replaces() -> None:
    """SanaWM feeds 16-bit query, key and value beside an fp32 layer input and fp32 parameters."""
    q, k, v, x, branch = operands()
    exact = salad(q, k, v, x, branch, sparsity=0.0)
    half = [t.to(torch.bfloat16) for t in (q, k, v)]
    out = salad(*half, x.float(), BranchTensors(*(t.float() for t in branch)), sparsity=0.0, dtype=torch.bfloat16)
    assert out.dtype == torch.bfloat16
    assert relative_error(out, exact) < 2e-2


def test_gradients_reach_everything() -> None:
    q, k, v, x, branch = operands()
    leaves = [t.clone().requires_grad_() for t in (q, k, v, x, *branch)]
    salad(*leaves[:4], BranchTensors(*leaves[4:])).square().sum().backward()
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() and leaf.grad.norm() > 0 for leaf in leaves)


def test_gradcheck() -> None:
    """At sparsity 0: a selection that flips under the finite differences would not be differentiable."""
    q, k, v, x, branch = operands()
    small = [t[:1, :, :35].detach() for t in (q, k, v)] + [x[:1, :35], *branch]
    leaves = [t.clone().requires_grad_() for t in small]
    assert torch.autograd.gradcheck(
        lambda *t: salad(*t[:4], BranchTensors(*t[4:]), sparsity=0.0), leaves, fast_mode=True
    )
