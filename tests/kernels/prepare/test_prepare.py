"""Prepared operands: the definition against norms and rotations written by others, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from salad_compile.kernels import KernelArgumentError, pool_blocks, prepare_operand, take_rows
from salad_compile.kernels.errors import KernelDifferentiationError
from salad_compile.kernels.linear.feature_maps import find_feature_map
from salad_compile.kernels.preparation import Preparation
from salad_compile.kernels.prepare import reference
from tests.kernels.prepare.cases import CASES, Case
from tests.support import relative_error

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def by_hand(case: Case, arguments: tuple[Any, ...]) -> list[torch.Tensor]:
    """In fp64: torch's own norms, and the rotation as a product with a matrix for each token."""
    x, tables, *_, weight, bias, order, inverse = arguments
    x, (cos, sin, *others) = x.double(), [table.double() for table in tables]
    other_sin, other_cos = others or (sin, cos)
    rows = x.transpose(1, 2).flatten(2) if case.over == "width" else x.transpose(1, 2)
    given = [None if tensor is None else tensor.double() for tensor in (weight, bias)]
    if case.norm == "rms":
        rows = F.rms_norm(rows, rows.shape[-1:], given[0], 1e-6)
    elif case.norm == "layer":
        rows = F.layer_norm(rows, rows.shape[-1:], *given, 1e-6)
    plain = rows.reshape(x.transpose(1, 2).shape).transpose(1, 2)
    matrix = torch.eye(case.head_dim, dtype=torch.float64).repeat(*cos.shape[:3], 1, 1)
    for pair in range(case.turned):
        a, b = (pair, pair + case.turned) if case.pairs == "halves" else (2 * pair, 2 * pair + 1)
        matrix[..., a, a], matrix[..., a, b] = cos[..., pair], -sin[..., pair]
        matrix[..., b, a], matrix[..., b, b] = other_sin[..., pair], other_cos[..., pair]
    rotated = torch.einsum("bhsij,bhsj->bhsi", matrix.expand(*x.shape[:3], -1, -1), plain)
    rotated = rotated if order is None else take_rows(rotated, order, inverse)
    out = [rotated]
    if case.feature_map:
        phi, _ = find_feature_map(case.feature_map)
        out += [plain, torch.einsum("bhsij,bhsj->bhsi", matrix.expand(*x.shape[:3], -1, -1), phi(plain))]
    return [*out, pool_blocks(rotated, case.block)] if case.block else out


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_definition_is_what_models_compute(case: Case) -> None:
    arguments = case.arguments(torch.float64)
    made = [out for out in prepare_operand(*arguments) if out.numel()]
    expected = by_hand(case, arguments)
    assert len(made) == len(expected)
    for ours, theirs in zip(made, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pairs": "thirds"}, "pairs must be one of interleaved, halves"),
        ({"norm": "batch"}, "norm must be one of none, rms, layer"),
        ({"turned": 9}, "9 pairs do not fit into 16 channels"),
        ({"tables": 3}, "tables must be two, or four"),
        ({"norm": "none"}, "belong to a norm, and there is none"),
        ({"block": 24}, "block must be one of"),
        ({"feature_map": "tanh"}, "unknown feature_map"),
    ],
)
def test_wrong_arguments_are_errors_that_say_so(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(KernelArgumentError, match=message):
        prepare_operand(*Case(**changes).arguments(torch.float32))


def test_wrong_sizes_are_errors_that_say_so() -> None:
    x, (cos, sin), *rest, weight, bias, order, inverse = Case().arguments(torch.float32)
    with pytest.raises(KernelArgumentError, match="does not broadcast to x"):
        prepare_operand(x, (cos, sin[:, :, 1:]), *rest, weight, bias, order, inverse)
    with pytest.raises(KernelArgumentError, match=r"weight must be \(48,\), got \(47,\)"):
        prepare_operand(x, (cos, sin), *rest, weight[1:], bias, order, inverse)
    with pytest.raises(KernelArgumentError, match="order and inverse go together"):
        prepare_operand(x, (cos, sin), *rest, weight, bias, order, None)
    with pytest.raises(KernelArgumentError, match="inverse is not the inverse"):
        prepare_operand(x, (cos, sin), *rest, weight, bias, order, order)


@pytest.mark.parametrize(
    ("shift", "message"), [(lambda order: order * 0, "not a permutation"), (lambda order: order + 1, "outside")]
)
def test_the_order_of_each_call_is_looked_at(shift: Callable[[torch.Tensor], torch.Tensor], message: str) -> None:
    """Calls of one shape are described once; what an order holds is not in its shape."""
    *arguments, order, inverse = Case().arguments(torch.float32)
    prepare_operand(*arguments, order, inverse)
    with pytest.raises(KernelArgumentError, match=message):
        prepare_operand(*arguments, shift(order), inverse)


GRADIENTS = [
    pytest.param(dataclasses.replace(case, scale=scale), marks=() if scale == 1.0 else pytest.mark.all_cases)
    for case in CASES
    for scale in (1.0, 4.0, 16.0)
]


def gradients_of(case: Case, dtype: torch.dtype, *, of_operator: bool) -> list[torch.Tensor]:
    """Of x, tables, weight and bias, by the operator or by autograd through the definition; all results weighted."""
    x, tables, *rest = case.arguments(dtype)
    leaves = [x, *tables, *(tensor for tensor in rest[6:8] if tensor is not None)]
    if not of_operator:  # in fp64, from what was rounded to this dtype
        leaves = [leaf.double() for leaf in leaves]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    x, tables, factors = leaves[0], leaves[1 : 1 + case.tables], leaves[1 + case.tables :]
    rest[6:8] = [*factors, *(None,) * (2 - len(factors))]
    if of_operator:
        made = prepare_operand(x, tables, *rest)
    else:
        made = reference.prepare_operand(x, Preparation(tables, *rest))
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(dtype) for out in made[:3]]
    loss = sum((out.double() * weight.double()).sum() for out, weight in zip(made, weights, strict=False))
    assert isinstance(loss, torch.Tensor)
    return list(torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", GRADIENTS, ids=str)
def test_gradients_are_those_of_the_definition(case: Case, dtype: torch.dtype) -> None:
    ours = gradients_of(case, dtype, of_operator=True)
    exact = gradients_of(case, dtype, of_operator=False)
    for gradient, expected in zip(ours, exact, strict=True):  # tables have dtypes of their own
        assert gradient.shape == expected.shape
        bound = 8 * max(torch.finfo(dtype).eps, torch.finfo(gradient.dtype).eps)
        assert relative_error(gradient.double(), expected) < bound


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    x, *rest = Case().arguments(torch.float32)
    rotated, plain, features, means = prepare_operand(x.requires_grad_(), *rest)
    assert all(out.requires_grad for out in (rotated, plain, features))
    assert not means.requires_grad
    (only,) = torch.autograd.grad(rotated.sum(), x)
    assert only.abs().max() > 0


@pytest.mark.parametrize("case", [CASES[2], CASES[7]], ids=str)
def test_opcheck(case: Case) -> None:
    x, tables, *rest = case.arguments(torch.float32)
    torch.library.opcheck(torch.ops.salad.prepare_operand.default, (x.requires_grad_(), list(tables), *rest))


def test_forward_mode_is_refused() -> None:
    x, *rest = Case().arguments(torch.float32)
    with pytest.raises(KernelDifferentiationError, match="no forward-mode derivative"):
        torch.func.jvp(lambda x: prepare_operand(x, *rest)[0], (x,), (x,))
