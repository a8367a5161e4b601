"""The Triton kernel that prepares operands against the definition in fp64."""

from __future__ import annotations

import pytest
import torch

from salad_compile.kernels import prepare_operand
from salad_compile.kernels.launch import interpreting
from salad_compile.kernels.preparation import Preparation
from salad_compile.kernels.prepare import reference
from tests.kernels.prepare.cases import CASES, Case

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
    again = prepare_operand(*arguments)
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
