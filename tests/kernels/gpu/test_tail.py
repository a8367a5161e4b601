"""The Triton kernels of the tail against the definition in fp64: outputs, lse and all gradients."""

from __future__ import annotations

import pytest
import torch

from salad_compile.kernels import pool_blocks, tail_means, tail_tokens, take_rows, take_rows_with_means, use_engine
from salad_compile.kernels.launch import interpreting
from salad_compile.kernels.tail import reference
from tests.kernels.helpers import make_qkv
from tests.kernels.tail.cases import Case, error, run_both

HALF = torch.float16
BAR = {torch.float32: 1e-4, HALF: 1e-2, torch.bfloat16: 2e-2}
CASES = (
    Case(203, (128, 64), 64, head_dim=32, layout="fused", scale=4.0, dense_row=True),
    Case(150, (64, 32), 16, head_dim=48, masked=True, text=20),
    *(
        Case(tokens, blocks, pool, 128, "fused", scale, dense_row=tokens % 2 == 1)
        for tokens, blocks, pool in ((1023, (128, 64), 256), (2048, (64, 64), 64), (777, (16, 16), 16))
        for scale in (1.0, 4.0, 16.0)
    ),
)
COUNTED = (  # blocks, pool, masked, first and last token of the video
    ((128, 64), 256, False, 0, 1023),
    ((128, 64), 128, True, 77, 1000),
    ((64, 64), 64, True, 0, 1023),
    ((32, 64), 16, False, 130, 1023),
    ((16, 32), 16, True, 0, 900),
    ((64, 16), 1, False, 5, 6),
)


@pytest.mark.parametrize(("blocks", "pool", "masked", "begin", "end"), COUNTED)
def test_counts_what_the_lists_leave_out(
    blocks: tuple[int, int], pool: int, masked: bool, begin: int, end: int
) -> None:
    device = "cpu" if interpreting() else "cuda"
    case = Case(1023, blocks, pool, dense_row=True, masked=masked)
    selection = case.selection(tuple(x.to(device) for x in make_qkv(1023, dtype=torch.float32)))
    given = (selection.lut, selection.count, 1023, blocks[1], pool, begin, end, selection.key_mask)
    with use_engine("triton"):
        counted = tail_tokens(*given)
    assert torch.equal(counted, reference.tail_tokens(*given))
    assert (counted > 0).any()


# interpreted, two cases, of which scores that are large run in the dtype that has the least room for them
GRID = [
    pytest.param(
        case, dtype, marks=pytest.mark.all_cases if interpreting() and case.scale > 1 and dtype != HALF else ()
    )
    for case in (CASES[:2] if interpreting() else CASES)
    for dtype in BAR
]


@pytest.mark.parametrize(("case", "dtype"), GRID, ids=str)
def test_equals_the_definition(case: Case, dtype: torch.dtype) -> None:
    device = "cpu" if interpreting() else "cuda"
    if dtype == torch.float16 and case.scale > 4:
        pytest.skip("scores of fp16 inputs at this scale are rounded by more than the bar in the inputs themselves")
    with use_engine("triton"):
        ours_twice = [run_both(case, dtype, device) for _ in range(1 if interpreting() else 2)]
    with use_engine("torch"):  # scores in the thousands lose digits whoever computes them
        plain = run_both(case, dtype, device)
    for (ours, expected), (theirs, _) in zip(ours_twice[0], plain, strict=True):
        assert error(ours, expected) < max(BAR[dtype], 2 * error(theirs, expected))
    for first, second in zip(ours_twice[0], ours_twice[-1], strict=True):
        assert torch.equal(first[0], second[0]), "two runs differ"


MEANS = (  # pool, block of known means, masked, first and last token of the video
    (256, 0, False, 0, 333),
    (64, 0, True, 30, 300),
    (600, 0, True, 0, 333),
    (24, 0, False, 5, 6),
    (128, 64, False, 0, 333),
    (64, 16, True, 0, 333),
)


# interpreted, one dtype
DTYPES = [pytest.param(x, marks=pytest.mark.all_cases if interpreting() and x != torch.bfloat16 else ()) for x in BAR]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("pool", "block", "masked", "begin", "end"), MEANS)
def test_means_of_pools(pool: int, block: int, masked: bool, begin: int, end: int, dtype: torch.dtype) -> None:
    """Of rows that are not valid whatever stands in them is left out."""
    device = "cpu" if interpreting() else "cuda"
    x = make_qkv(333, "fused", dtype, head_dim=48)[1].to(device)
    mask = torch.rand(2, 333, generator=torch.Generator().manual_seed(1)).to(device) < 0.6 if masked else None
    if mask is not None:
        x = x.masked_fill(~mask[:, None, :, None], float("nan"))
    clean = torch.nan_to_num(x.double())
    expected = reference.tail_means(clean, pool, begin, end, mask)
    with use_engine("torch"):
        known = pool_blocks(torch.nan_to_num(x), block, mask) if block else None
    with use_engine("triton"):
        ours = tail_means(x, pool, begin, end, mask, known, block)
    torch.testing.assert_close(ours.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    assert (expected != 0).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("pool", "begin", "end"), [(256, 0, 333), (96, 30, 300)])
def test_rows_are_moved_and_their_means_with_them(pool: int, begin: int, end: int, dtype: torch.dtype) -> None:
    device = "cpu" if interpreting() else "cuda"
    x = make_qkv(333, "fused", dtype, head_dim=48)[2].to(device)
    order = torch.randperm(333, generator=torch.Generator().manual_seed(2)).to(torch.int32)
    order, inverse = order.to(device), order.argsort().to(torch.int32).to(device)
    with use_engine("triton"):
        rows, means = take_rows_with_means(x, order, inverse, pool, begin, end)
    moved = take_rows(x, order, inverse)
    assert torch.equal(rows, moved)
    assert rows.stride() == moved.stride()
    expected = reference.tail_means(moved.double(), pool, begin, end)
    torch.testing.assert_close(means.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
