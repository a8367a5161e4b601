"""Orders of the tokens of a grid: permutations, compact runs, one compilation, and the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from salad_compile.grid import orders
from salad_compile.grid.orders import cached_order, joint_order, temporal_order, tile_order
from salad_compile.grid.sizes import Grid

CPU = torch.device("cpu")
DOCUMENT = Path(__file__).parents[3] / "docs" / "kernels.md"
EDGE = st.integers(1, 23)
GRIDS = st.tuples(EDGE, EDGE, EDGE)
ODD_GRIDS: list[Grid] = [(1, 1, 1), (1, 1, 7), (7, 1, 1), (1, 7, 1), (1, 8, 8), (2, 7, 11), (13, 17, 19), (3, 67, 61)]


@pytest.fixture(autouse=True)
def _fresh_cache() -> Iterator[None]:
    orders._stored_order.cache_clear()
    yield
    orders._stored_order.cache_clear()


def _tokens(grid: Grid) -> int:
    return grid[0] * grid[1] * grid[2]


def _native(grid: Grid) -> Tensor:
    return torch.arange(_tokens(grid), dtype=torch.int32)


def locality(order: Tensor | None, grid: Grid, block: int) -> float:
    """How far runs of `block` tokens spread: the mean over runs of the mean squared distance to the run's centre.

    The distance is in tokens, along time as along height and width. Smaller is more compact. The last run may be short.

    Args:
        order: (T * H * W,) of any integer dtype; None is the native order.
    """
    frames, rows, width = grid
    tokens = frames * rows * width
    native = torch.arange(tokens) if order is None else order.to("cpu", torch.int64)
    at = torch.stack((native // (rows * width), native // width % rows, native % width), dim=1).double()
    run = torch.arange(tokens) // block
    count = torch.bincount(run).double()
    centre = torch.zeros(len(count), 3, dtype=torch.double).index_add_(0, run, at) / count[:, None]
    distance = (at - centre[run]).square().sum(dim=1)
    return float((torch.bincount(run, weights=distance) / count).mean())


def _assert_permutation(order: Tensor, grid: Grid) -> None:
    assert order.dtype == torch.int32
    assert torch.equal(order.sort().values, _native(grid))


# ---------------------------------------------------------------- orders


@settings(max_examples=60, deadline=None)
@given(grid=GRIDS, tile=st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_tile_order_is_a_permutation(grid: Grid, tile: tuple[int, int]) -> None:
    _assert_permutation(tile_order(grid, tile), grid)


@pytest.mark.parametrize("grid", ODD_GRIDS)
def test_prime_and_unit_grids(grid: Grid) -> None:
    for order in (tile_order(grid), temporal_order(grid)):
        _assert_permutation(order, grid)
    assert locality(tile_order(grid), grid, 64) <= locality(None, grid, 64)


@settings(max_examples=40, deadline=None)
@given(grid=GRIDS)
def test_temporal_order_is_the_formula_of_the_method(grid: Grid) -> None:
    frames, rows, width = grid
    order = temporal_order(grid)
    _assert_permutation(order, grid)
    t, yx = order.long() // (rows * width), order.long() % (rows * width)
    assert torch.equal(yx * frames + t, torch.arange(_tokens(grid)))


@settings(max_examples=40, deadline=None)
@given(grid=GRIDS)
def test_the_walk_never_jumps_along_the_width(grid: Grid) -> None:
    """There and back: each slice is beside the one before, also where a column ends."""
    x = tile_order(grid) % grid[2]
    assert torch.all(x.diff().abs() <= 1)


def test_runs_are_cubes_where_nothing_is_in_the_way() -> None:
    grid = (8, 16, 32)
    order = tile_order(grid).long().view(-1, 64)
    at = torch.stack((order // (16 * 32), order // 32 % 16, order % 32), dim=-1)
    assert torch.equal(at.amax(1) - at.amin(1), torch.full((64, 3), 3))
    assert locality(tile_order(grid), grid, 64) == pytest.approx(3.75)  # 3 axes of (4 ** 2 - 1) / 12 each
    assert locality(tile_order(grid), grid, 128) == pytest.approx(7.75)


def test_one_frame_gets_square_runs() -> None:
    """An image: rows of 4 would be 16 long in a run of 64, and spread as 22.5."""
    assert locality(tile_order((1, 64, 64)), (1, 64, 64), 64) < 11


def test_locality_of_what_is_known() -> None:
    assert locality(None, (1, 1, 6), 3) == pytest.approx(2 / 3)
    assert locality(None, (1, 1, 4), 3) == pytest.approx(1 / 3)  # the last run is one token
    assert locality(None, (2, 3, 5), 1) == 0
    assert locality(_native((2, 3, 5)), (2, 3, 5), 8) == locality(None, (2, 3, 5), 8)


def _cubes(grid: Grid, there_and_back: bool) -> Tensor:
    """Cubes of 4 x 4 x 4, shorter at the border, one after another: what tile_order does better."""
    native = torch.arange(_tokens(grid))
    at = (native // (grid[1] * grid[2]), native // grid[2] % grid[1], native % grid[2])
    key = torch.zeros_like(native)
    for digit, count in [(x // 4, -(-size // 4)) for x, size in zip(at, grid, strict=True)]:
        turned = torch.where(key % 2 == 1, count - 1 - digit, digit) if there_and_back else digit
        key = key * count + turned
    if not there_and_back:
        return (key * len(native) + native).argsort()
    for digit, count in reversed(list(zip(at, grid, strict=True))):
        key = key * count + torch.where(key % 2 == 1, count - 1 - digit, digit)
    return key.argsort()


# native, cubes, cubes there and back, tile_order for runs of 64; tile_order for runs of 128
LOCALITY: dict[Grid, tuple[float, ...]] = {
    (21, 30, 52): (226.05, 29.97, 5.04, 4.24, 8.31),
    (21, 45, 80): (505.95, 5.32, 5.25, 4.01, 7.46),
    (13, 30, 45): (169.15, 38.77, 7.51, 4.23, 8.07),
    (21, 60, 104): (765.12, 12.47, 4.60, 3.95, 7.57),
    (5, 16, 16): (22.50, 7.50, 7.50, 4.17, 7.01),
    (31, 16, 24): (47.91, 5.09, 4.04, 3.83, 8.05),
    (23, 29, 53): (233.78, 40.83, 6.72, 4.16, 8.22),
}


def _mean(tile: tuple[int, int], block: int) -> float:
    return sum(locality(tile_order(grid, tile), grid, block) for grid in LOCALITY) / len(LOCALITY)


@pytest.mark.parametrize("grid", LOCALITY)
def test_locality_table(grid: Grid) -> None:
    """The numbers of docs/kernels.md."""
    orders = (None, _cubes(grid, False), _cubes(grid, True), tile_order(grid))
    measured = [locality(order, grid, 64) for order in orders] + [locality(tile_order(grid), grid, 128)]
    assert measured == pytest.approx(LOCALITY[grid], abs=0.006)
    row = " | ".join(f"{value:.2f}" for value in measured[:4])
    assert row in " ".join(DOCUMENT.read_text().split()), row
    assert min(measured[:4]) == measured[3]


def test_default_tile_is_the_best_for_keys() -> None:
    assert _mean((4, 4), 64) == pytest.approx(4.09, abs=0.006)
    assert _mean((4, 4), 128) == pytest.approx(7.81, abs=0.006)
    others = {(5, 4): (4.35, 7.12), (4, 5): (4.61, 7.04), (5, 5): (4.97, 6.75)}
    for tile, (keys, queries) in others.items():
        assert (_mean(tile, 64), _mean(tile, 128)) == pytest.approx((keys, queries), abs=0.006)


@pytest.mark.parametrize("text_first", [False, True])
@pytest.mark.parametrize("text", [0, 1, 17])
def test_joint_order(text: int, text_first: bool) -> None:
    grid = (2, 7, 11)
    order = tile_order(grid)
    joint = joint_order(order, text, text_first)
    assert joint.dtype == torch.int32
    sequence = torch.cat(
        [torch.full((text,), -1), torch.arange(154)] if text_first else [torch.arange(154), torch.full((text,), -1)]
    )
    assert torch.equal(sequence[joint.long()], torch.cat((order, torch.full((text,), -1))))
    first = 0 if text_first else 154
    assert joint[154:].tolist() == list(range(first, first + text))


# ---------------------------------------------------------------- compiled

COMPILED_GRIDS: list[Grid] = [(3, 5, 7), (4, 6, 9), (5, 16, 16), (13, 11, 2), (2, 8, 31), (1, 9, 8)]


@pytest.mark.parametrize("order", [tile_order, temporal_order, lambda grid: cached_order(tile_order, grid, CPU)])
def test_compiles_once_for_all_grids(order: Callable[[Grid], Tensor]) -> None:
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(order, backend=counter, fullgraph=True, dynamic=True)
    for grid in COMPILED_GRIDS:
        assert torch.equal(compiled(grid), order(grid)), grid
    assert counter.frame_count == 1


def test_joint_order_compiles_once() -> None:
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(joint_order, backend=counter, fullgraph=True, dynamic=True)
    for grid, text in zip(COMPILED_GRIDS, (17, 5, 9, 2, 30, 11), strict=True):
        assert torch.equal(compiled(tile_order(grid), text, True), joint_order(tile_order(grid), text, True))
    assert counter.frame_count == 1


def test_joint_order_runs_on_proxies() -> None:
    """attention.py is spliced into graphs by calling it with proxies."""
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    order, text = (fx.Proxy(graph.placeholder(name), tracer) for name in ("order", "text"))
    first, last = joint_order(order, text, True), joint_order(order, text, False)  # type: ignore[arg-type]
    graph.output((first.node, last.node))  # type: ignore[attr-defined]
    module = fx.GraphModule(nn.Module(), graph)
    native = tile_order((3, 4, 5))
    outs = module(native, 7)
    assert torch.equal(outs[0], joint_order(native, 7, True))
    assert torch.equal(outs[1], joint_order(native, 7, False))


# ---------------------------------------------------------------- cache


def test_cache_keeps_few_orders() -> None:
    first = cached_order(tile_order, (2, 3, 4), CPU)
    assert cached_order(tile_order, (2, 3, 4), "cpu") is first
    assert cached_order(tile_order, (2, 4, 3), CPU) is not first
    assert torch.equal(first[0], tile_order((2, 3, 4)))
    assert torch.equal(first[0][first[1].long()], _native((2, 3, 4)))
    for size in range(orders.CACHED_ORDERS):
        cached_order(tile_order, (2, 3, 5 + size), CPU)
    assert cached_order(tile_order, (2, 3, 4), CPU) is not first


def test_cache_and_fake_tensors_stay_apart() -> None:
    with FakeTensorMode():
        assert isinstance(cached_order(tile_order, (2, 3, 4), CPU), FakeTensor)
    real = cached_order(tile_order, (2, 3, 4), CPU)
    assert type(real) is Tensor
    with FakeTensorMode() as mode:
        fake = cached_order(tile_order, (2, 3, 4), CPU)
        assert isinstance(fake, FakeTensor)
        assert fake.fake_mode is mode
    assert cached_order(tile_order, (2, 3, 4), CPU) is real


def test_cache_is_not_read_while_dynamo_compiles() -> None:
    cached_order(tile_order, (2, 3, 4), CPU)
    before = orders._stored_order.cache_info()
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: x + cached_order(tile_order, (2, 3, 4), x.device), backend="eager", fullgraph=True
    )
    assert torch.equal(compiled(torch.zeros(2, 24))[0], tile_order((2, 3, 4)).float())
    assert orders._stored_order.cache_info() == before


def test_cache_keeps_no_inference_tensor() -> None:
    with torch.inference_mode():
        cached_order(tile_order, (2, 3, 4), CPU)
    assert not cached_order(tile_order, (2, 3, 4), CPU).is_inference()


def test_cache_keeps_devices_apart() -> None:
    assert cached_order(tile_order, (2, 3, 4), "meta").is_meta
    assert not cached_order(tile_order, (2, 3, 4), CPU).is_meta
