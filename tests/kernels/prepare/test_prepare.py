"""Prepared operands: the definition against norms and rotations written by others, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from salad_compile.kernels import KernelArgumentError, UnsupportedKernelError, pool_blocks, prepare_operand, take_rows
from salad_compile.kernels.linear.feature_maps import find_feature_map
from tests.kernels.prepare.cases import CASES, Case

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


def test_no_gradient_is_lost_silently() -> None:
    x, *rest = Case().arguments(torch.float32)
    rotated, *_ = prepare_operand(x.requires_grad_(), *rest)
    with pytest.raises((RuntimeError, UnsupportedKernelError), match=r"no autograd formula|does not require grad"):
        rotated.sum().backward()
