"""Sliding windows against a definition by brute force, over token positions instead of formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck
from torch.testing import assert_close

from salad_compile.grid.orders import order_and_inverse, temporal_order
from salad_compile.grid.sizes import Grid
from salad_compile.kernels import KernelArgumentError, block_sparse_attention, measure_executions, window_blocks
from salad_compile.kernels.layout import ALL_BLOCKS
from salad_compile.kernels.windows.reach import doubled_reach, doubled_reach_of, reach_in_tokens

GRIDS: tuple[Grid, ...] = ((1, 1, 1), (3, 5, 7), (5, 7, 11), (2, 13, 17), (7, 1, 19), (4, 8, 8))
BLOCKS = ((16, 16), (32, 16), (64, 64), (128, 64), (16, 32))


def brute_force(tokens: int, blocks: tuple[int, int], reach: float) -> list[list[int]]:
    """For each query block the key blocks with their centre within `reach`, and those that share a token with it."""
    query_block, key_block = blocks
    found = []
    for i in range(math.ceil(tokens / query_block)):
        mine = set(range(i * query_block, (i + 1) * query_block))
        near = [
            j
            for j in range(math.ceil(tokens / key_block))
            if abs((j + 0.5) * key_block - (i + 0.5) * query_block) <= reach
            or mine & set(range(j * key_block, (j + 1) * key_block))
        ]
        found.append(near)
    return found


def rows(lut: torch.Tensor, count: torch.Tensor) -> list[list[int]]:
    assert torch.equal(lut, lut[:1, :1].expand_as(lut))
    return [row[:kept].tolist() for row, kept in zip(lut[0, 0], count[0, 0].tolist(), strict=True)]


def windows(tokens: int, *settings: Any, heads: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a video without text, unless settings say where it is."""
    lut, count = window_blocks(torch.empty(2, heads, tokens, 4), *settings)
    return lut, count


@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_equals_brute_force(grid: Grid, blocks: tuple[int, int]) -> None:
    tokens = math.prod(grid)
    for permille in (0, 1, 51, 100, 226, 500, 999, 1000):
        for window in (0, 1, 40):
            lut, count = windows(tokens, *blocks, permille, window, 0, 0, 0, tokens)
            reach = window or math.floor(tokens * math.floor(1e6 * (1 - math.sqrt(1 - permille / 1000)) + 1e-6) / 1e6)
            assert rows(lut, count) == brute_force(tokens, blocks, reach)
            assert lut.shape == (2, 2, math.ceil(tokens / blocks[0]), lut.shape[-1])
            assert 1 <= lut.shape[-1] <= math.ceil(tokens / blocks[1])


def test_the_window_of_the_specification() -> None:
    """specification 4.3: w = 1,681 tokens at N = 32,760 and sparsity 0.9, which leaves out 90.1 % at 128 x 64."""
    assert reach_in_tokens(32760, 100) == 1681
    lut, count = windows(32760, 128, 64, 100, 0, 0, 0, 0, 32760, heads=1)
    key_rows = torch.full((512,), 64)
    key_rows[-1] = 32760 - 511 * 64
    valid = torch.arange(lut.shape[-1]) < count[0, 0][:, None]
    keys = (key_rows[lut[0, 0].long()] * valid).sum(-1)
    query_rows = torch.full((256,), 128)
    query_rows[-1] = 32760 - 255 * 128
    assert 1 - float((keys * query_rows).sum()) / 32760**2 == pytest.approx(0.901, abs=5e-4)


@pytest.mark.parametrize("sparsity", [0.5, 0.774, 0.9])
def test_reported_sparsity_is_what_was_computed(sparsity: float) -> None:
    """The pairs that attention really visited, counted from where its output depends on the keys."""
    tokens, blocks = 331, (32, 16)
    query, key, value = torch.randn(3, 1, 1, tokens, 8, dtype=torch.float64).unbind(0)
    lut, count = window_blocks(query, *blocks, round(1000 * (1 - sparsity)), 0, 0, 0, 0, tokens)
    with measure_executions() as executions:
        block_sparse_attention(query, key, value, lut, count, *blocks, 0.3, None)
    visited = torch.autograd.functional.jacobian(
        lambda v: block_sparse_attention(query, key, v, lut, count, *blocks, 0.3, None)[0].sum(-1), value
    )
    pairs = int((visited[0, 0, :, 0, 0].abs().sum(-1) > 0).sum())
    assert executions[0].computed_pairs == pairs
    assert executions[0].sparsity == pytest.approx(sparsity, abs=0.06)


def test_sparsity_zero_is_dense_in_either_order() -> None:
    query, key, value = torch.randn(3, 1, 2, 105, 8, dtype=torch.float64).unbind(0)
    lut, count = window_blocks(query, 32, 16, 1000, 0, 0, 0, 0, 105)
    order, inverse = order_and_inverse(temporal_order, (3, 5, 7))
    for taken, back in (None, None), (order, inverse):
        moved = [x if taken is None else x[:, :, taken] for x in (query, key, value)]
        out = block_sparse_attention(*moved, lut, count, 32, 16, 8**-0.5, None)[0]
        out = out if back is None else out[:, :, back]
        assert_close(out, F.scaled_dot_product_attention(query, key, value))


@pytest.mark.parametrize("text", [(0, 20), (185, 205)])
def test_text_is_in_every_window_and_dense_itself(text: tuple[int, int]) -> None:
    tokens, (query_block, key_block) = 205, (32, 16)
    video = (20, 205) if text[0] == 0 else (0, 185)
    lut, count = windows(tokens, query_block, key_block, 100, 0, *text, *video)
    plain = brute_force(tokens, (query_block, key_block), reach_in_tokens(185, 100))
    sinks = set(range(text[0] // key_block, math.ceil(text[1] / key_block)))
    dense = set(range(text[0] // query_block, math.ceil(text[1] / query_block)))
    for i, near in enumerate(plain):
        if i in dense:
            assert (count[:, :, i] == ALL_BLOCKS).all()
        else:
            assert lut[0, 0, i, : count[0, 0, i]].tolist() == sorted(sinks | set(near))


@pytest.mark.parametrize("blocks", [(32, 16), (128, 64)], ids=str)
def test_a_density_that_is_a_tensor_gives_the_same_windows(blocks: tuple[int, int]) -> None:
    for tokens in (203, 1999):
        every = torch.arange(1001, dtype=torch.int32)
        by_tensor = doubled_reach_of(every, tokens, *blocks).tolist()
        assert by_tensor == [int(doubled_reach(tokens, permille, 0, *blocks)) for permille in range(1001)]
        for permille in (0, 37, 250, 400):
            now = torch.tensor(permille, dtype=torch.int32)
            changed = windows(tokens, *blocks, 400, 0, 0, 0, 0, tokens, now)
            assert rows(*changed) == rows(*windows(tokens, *blocks, permille, 0, 0, 0, 0, tokens))


def test_it_is_a_proper_operator() -> None:
    query = torch.randn(1, 2, 70, 8)
    now = torch.tensor(120, dtype=torch.int32)
    for arguments in ((0, 0, 0, 70), (0, 9, 9, 70), (60, 70, 0, 60)):
        opcheck(torch.ops.salad.window_blocks.default, (query, 32, 16, 250, 0, *arguments, now))


def test_dynamic_lengths_trace_without_a_guard_on_the_length() -> None:
    compiled = torch.compile(
        lambda q: window_blocks(q, 32, 16, 250, 0, 0, 0, 0, q.shape[2])[0], backend="eager", dynamic=True
    )
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (70, 71, 333):
            query = torch.empty(1, 2, tokens, 8)
            assert torch.equal(compiled(query), window_blocks(query, 32, 16, 250, 0, 0, 0, 0, tokens)[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((24, 16, 100, 0, 0, 0, 0, 70), "must divide"),
        ((32, 16, 1001, 0, 0, 0, 0, 70), "0..1000"),
        ((32, 16, 100, -1, 0, 0, 0, 70), "window"),
        ((32, 16, 100, 0, 0, 80, 0, 70), "must lie within 70"),
        ((32, 16, 100, 0, 0, 0, 70, 70), "must lie within 70"),
        ((32, 16, 100, 0, 0, 0, 0, 70, torch.tensor(101, dtype=torch.int32)), "0..100"),
        ((32, 16, 100, 0, 0, 0, 0, 70, torch.tensor(10)), "int32"),
    ],
)
def test_bad_arguments(settings: tuple[Any, ...], message: str) -> None:
    with pytest.raises(KernelArgumentError, match=message):
        windows(70, *settings)
