"""The Triton kernel that prepares operands against the definition in fp64."""

from __future__ import annotations

import pytest
import torch

from salad_compile.kernels import prepare_operand, use_engine
from salad_compile.kernels.launch import interpreting
from salad_compile.kernels.preparation import Preparation
from salad_compile.kernels.prepare import reference
from tests.kernels.prepare.cases import CASES, Case
from tests.support import relative_error

# units of the last place: a rounding of the rows without position is one, and the rotation's own another
EPSILON = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
LARGE = (
    Case(heads=12, head_dim=128, turned=64, tokens=1031, block=128),
    Case(heads=40, head_dim=128, turned=64, tokens=777, block=64, norm="layer"),
    Case(heads=32, head_dim=64, turned=32, tokens=1031, tables=4, table_heads=True, fused=True),
    Case(heads=24, head_dim=128, turned=64, tokens=1031, over="head", pairs="halves", feature_map="softmax"),
)


FIRST = list(EPSILON)  # every case in one dtype, and in all of them where that takes no time
GRID = [
    pytest.param(case, dtype, marks=() if dtype == FIRST[at % 3] or not interpreting() else pytest.mark.all_cases)
    for at, case in enumerate(CASES if interpreting() else CASES + LARGE)
    for dtype in EPSILON
]


@pytest.mark.parametrize(("case", "dtype"), GRID)
def test_equals_the_definition(case: Case, dtype: torch.dtype, device: str) -> None:
    arguments = case.arguments(dtype, device)
    x, tables, *settings = arguments
    ours = prepare_operand(*arguments)
    again = ours if interpreting() else prepare_operand(*arguments)  # programs run one after another there
    exact = reference.prepare_operand(x.double(), Preparation([table.double() for table in tables], *settings))
    largest = max(1.0, max(float(table.abs().max()) for table in tables))
    rounded = reference.prepare_operand(x, Preparation(tables, *settings))
    for first, second, expected, plain in zip(ours, again, exact, rounded, strict=True):
        assert torch.equal(first, second)
        assert first.dtype == plain.dtype
        assert first.shape == expected.shape
        assert first.stride() == plain.stride()
        if expected.numel():
            bound = EPSILON[dtype] * (1 + float(expected.abs().max())) * largest
            assert float((first.double() - expected).abs().max()) < 2 * bound
            assert float((first.double() - plain.double()).abs().max()) <= bound


def test_a_wrong_order_does_not_leave_the_tensors(device: str) -> None:
    if device == "cpu":
        pytest.skip("on the CPU it is an error")
    *arguments, order, inverse = Case().arguments(torch.bfloat16, device)
    order[3], order[5] = 1 << 30, -5
    prepare_operand(*arguments, order, inverse)
    torch.cuda.synchronize()


@pytest.mark.parametrize("case", LARGE[1:3], ids=str)
def test_gradients_do_not_depend_on_the_device(case: Case, device: str) -> None:
    """They are plain torch; the forward that they belong to is the kernel's."""
    if device == "cpu":
        pytest.skip("tests/kernels/prepare has them against the definition")

    def gradients(dtype: torch.dtype, device: str) -> list[torch.Tensor]:
        x, tables, *rest = case.arguments(torch.bfloat16, device)
        x, tables = x.to(dtype), [table.to(dtype) if dtype == torch.float64 else table for table in tables]
        weight = rest[6].to(dtype).requires_grad_()
        made = prepare_operand(x.requires_grad_(), tables, *rest[:6], weight, *rest[7:])
        return list(torch.autograd.grad(sum(out.sum() for out in made[:3]), [x, weight]))  # type: ignore[arg-type]

    with use_engine("torch"):
        exact = gradients(torch.float64, "cpu")
    for ours, expected in zip(gradients(torch.bfloat16, device), exact, strict=True):
        assert relative_error(ours.cpu().double(), expected) < 8 * 2.0**-8
