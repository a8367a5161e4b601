"""Orders of the token grid and where the grid is read from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from salad_compile.errors import ConfigError, GridMismatchError, SaladError
from salad_compile.grid import geometry
from salad_compile.grid.geometry import (
    Grid,
    GridRule,
    cached_order,
    checked_grid,
    find_grid_rule,
    joint_order,
    locality,
    read_grid,
    temporal_order,
    tile_order,
)

CPU = torch.device("cpu")
EDGE = st.integers(1, 23)
GRIDS = st.tuples(EDGE, EDGE, EDGE)
ODD_GRIDS: list[Grid] = [(1, 1, 1), (1, 1, 7), (7, 1, 1), (1, 7, 1), (1, 8, 8), (2, 7, 11), (13, 17, 19), (3, 67, 61)]


@pytest.fixture(autouse=True)
def _fresh_cache() -> Iterator[None]:
    geometry._stored_order.cache_clear()
    yield
    geometry._stored_order.cache_clear()


def _tokens(grid: Grid) -> int:
    return grid[0] * grid[1] * grid[2]


def _native(grid: Grid) -> Tensor:
    return torch.arange(_tokens(grid), dtype=torch.int32)


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
    """The numbers in the docstring of geometry.py."""
    orders = (None, _cubes(grid, False), _cubes(grid, True), tile_order(grid))
    measured = [locality(order, grid, 64) for order in orders] + [locality(tile_order(grid), grid, 128)]
    assert measured == pytest.approx(LOCALITY[grid], abs=0.006)
    row = " | ".join(f"{value:.2f}" for value in measured[:4])
    assert row in " ".join(str(geometry.__doc__).split()), row
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


RULES = {
    "latent": GridRule("latent", ("x",), (2, 3, 4), (1, 2, 2)),
    "arguments": GridRule("arguments", ("frames", "height", "width")),
    "function": lambda named: (named["frames"], named["x"].shape[3] // 2, named["width"]),
}


@pytest.mark.parametrize("kind", RULES)
def test_rules_trace_with_symbolic_sizes(kind: str) -> None:
    source = RULES[kind]

    def forward(x: Tensor, frames: int, height: int, width: int) -> Tensor:
        named = {"x": x, "frames": frames, "height": height, "width": width}
        return cached_order(tile_order, read_grid(source, named), x.device) + x.sum()

    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(forward, backend=counter, fullgraph=True, dynamic=True)
    for t, h, w in [(3, 5, 7), (4, 6, 9), (9, 3, 4)]:
        arguments = (torch.ones(1, 2, t, 2 * h, 2 * w), t, h, w)
        assert torch.equal(compiled(*arguments), forward(*arguments))
    assert counter.frame_count == 1


def test_the_check_traces_with_symbolic_sizes() -> None:
    def forward(x: Tensor) -> Tensor:
        grid = RULES["latent"].grid({"x": x})  # type: ignore[attr-defined]
        return tile_order(checked_grid(grid, x[0, 0, :, ::2, ::2].numel()))

    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(forward, backend=counter, fullgraph=True, dynamic=True)
    for t, h, w in [(3, 5, 7), (4, 6, 9), (9, 3, 4)]:
        x = torch.ones(1, 2, t, 2 * h, 2 * w)
        assert torch.equal(compiled(x), tile_order((t, h, w)))
    assert counter.frame_count == 1


# ---------------------------------------------------------------- cache


def test_cache_keeps_few_orders() -> None:
    first = cached_order(tile_order, (2, 3, 4), CPU)
    assert cached_order(tile_order, (2, 3, 4), "cpu") is first
    assert cached_order(tile_order, (2, 4, 3), CPU) is not first
    assert torch.equal(first[0], tile_order((2, 3, 4)))
    assert torch.equal(first[0][first[1].long()], _native((2, 3, 4)))
    for size in range(geometry.CACHED_ORDERS):
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
    before = geometry._stored_order.cache_info()
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: x + cached_order(tile_order, (2, 3, 4), x.device), backend="eager", fullgraph=True
    )
    assert torch.equal(compiled(torch.zeros(2, 24))[0], tile_order((2, 3, 4)).float())
    assert geometry._stored_order.cache_info() == before


def test_cache_keeps_no_inference_tensor() -> None:
    with torch.inference_mode():
        cached_order(tile_order, (2, 3, 4), CPU)
    assert not cached_order(tile_order, (2, 3, 4), CPU).is_inference()


def test_cache_keeps_devices_apart() -> None:
    assert cached_order(tile_order, (2, 3, 4), "meta").is_meta
    assert not cached_order(tile_order, (2, 3, 4), CPU).is_meta


# ---------------------------------------------------------------- finding the grid

LATENT = torch.empty(1, 16, 21, 60, 104, device="meta")
GRID = (21, 30, 52)
TOKENS = _tokens(GRID)


def _video(*shape: int) -> dict[str, Tensor]:
    text = torch.empty(shape[0], 17, 32, device="meta")
    return {"hidden_states": torch.empty(shape, device="meta"), "encoder_hidden_states": text}


@pytest.mark.parametrize(
    ("shape", "patch", "axes"),
    [
        ((1, 16, 21, 60, 104), (1, 2, 2), (2, 3, 4)),  # Wan
        ((2, 21, 16, 60, 104), 2, (1, 3, 4)),  # CogVideoX
        ((1, 21, 60, 104, 16), [1, 2, 2], (1, 2, 3)),  # Kandinsky
        ((1, 16, 21, 60, 104), (2, 2), (2, 3, 4)),
        ((1, 16, 21, 59, 103), 2, (2, 3, 4)),  # incomplete patches
    ],
)
def test_latents_with_the_configured_patch(shape: tuple[int, ...], patch: Any, axes: Grid) -> None:
    found = find_grid_rule(_video(*shape), TOKENS, patch_size=patch)
    assert found.rule == GridRule("latent", ("hidden_states",), axes, (1, 2, 2))
    assert found.rule.grid(_video(*shape)) == GRID
    assert "21x30x52" in found.reason


def test_a_temporal_patch_of_its_own() -> None:
    """CogVideoX 1.5: an odd number of latent frames is padded."""
    inputs = _video(1, 21, 16, 60, 104)
    found = find_grid_rule(inputs, 11 * 30 * 52, patch_size=2, patch_size_t=2)
    assert found.rule == GridRule("latent", ("hidden_states",), (1, 3, 4), (2, 2, 2))
    assert found.rule.grid(_video(1, 22, 16, 60, 106)) == (11, 30, 53)


@pytest.mark.parametrize("conv", [(21, 30, 52), (30, 52), torch.Size((30, 52))])
@pytest.mark.parametrize("patch", [None, "2", (2,), 0, (1, 2, 2, 2), (1, "2", 2)])
def test_latents_with_a_patch_convolution(patch: Any, conv: tuple[int, ...]) -> None:
    found = find_grid_rule(_video(1, 16, 21, 60, 104), TOKENS, patch_size=patch, conv_grids=[(17,), (3, 4), conv])
    assert found.rule == GridRule("latent", ("hidden_states",), (2, 3, 4), (1, 2, 2))


def test_a_patch_that_nothing_confirms_is_no_rule() -> None:
    found = find_grid_rule(_video(1, 16, 21, 60, 104), TOKENS)
    assert found.rule is None
    assert "confirms" in found.reason
    assert "grid=" in found.reason


def test_attention_within_frames_is_no_rule() -> None:
    """Latte: 154 tokens are one frame of two, and not both in patches of two frames."""
    found = find_grid_rule(_video(1, 4, 2, 22, 28), 154, patch_size=2, conv_grids=[(11, 14)])
    assert found.rule is None
    assert "confirms" in found.reason


def test_a_convolution_overrules_a_configured_patch_that_does_not_fit() -> None:
    found = find_grid_rule(_video(1, 16, 21, 60, 104), 21 * 15 * 26, patch_size=2, conv_grids=[(21, 15, 26)])
    assert found.rule is not None
    assert found.rule.patch == (1, 4, 4)


def test_a_list_of_videos_without_a_batch_axis() -> None:
    inputs = {"x": [torch.empty(16, 21, 60, 104, device="meta")]}
    found = find_grid_rule(inputs, TOKENS, patch_size=(1, 2, 2))
    assert found.rule == GridRule("latent", ("x",), (2, 3, 4), (1, 2, 2))
    assert found.rule.grid(inputs) == GRID


def _ltx(**changes: Any) -> dict[str, Any]:
    packed = torch.empty(1, TOKENS, 128, device="meta")
    named = {"hidden_states": packed, "num_frames": 21, "height": 30, "width": 52, "fps": 24, "return_dict": True}
    return named | changes


@pytest.mark.parametrize("other", [{}, {"audio_num_frames": 21}, {"num_text_frames": 21}, {"max_height": 30}])
def test_three_integers(other: dict[str, Any]) -> None:
    inputs = other | _ltx()
    found = find_grid_rule(inputs, TOKENS, patch_size=1)
    assert found.rule == GridRule("arguments", ("num_frames", "height", "width"))
    assert found.rule.grid(_ltx(num_frames=3, height=4, width=5)) == (3, 4, 5)


def test_integers_with_short_names() -> None:
    found = find_grid_rule({"x": torch.empty(1, 60, 8), "w": 5, "h": 4, "f": 3}, 60)
    assert found.rule == GridRule("arguments", ("f", "h", "w"))


def test_integers_of_another_product_are_named() -> None:
    found = find_grid_rule(_ltx(height=480, width=832), TOKENS)
    assert found.rule is None
    assert "21x480x832 from arguments num_frames, height, width" in found.reason


def test_nothing_to_read_from() -> None:
    found = find_grid_rule({"x": torch.empty(1, 60, 8), "flag": True}, 60)
    assert found.rule is None
    assert "no argument of forward shows the grid" in found.reason


def test_another_number_of_tokens_is_no_rule() -> None:
    found = find_grid_rule(_video(1, 16, 21, 60, 104), TOKENS + 1560, patch_size=2, conv_grids=[(21, 30, 52)])
    assert found.rule is None
    for part in (str(TOKENS + 1560), "21x30x52", "Patch convolutions put out", "grid="):
        assert part in found.reason


def test_ambiguous_axes() -> None:
    """(1, 8, 4, 16, 16) as (B, C, T, H, W) in patches of (1, 1, 1), or as (B, T, C, H, W) in patches of (2, 1, 1)."""
    inputs = _video(1, 8, 4, 16, 16)
    assert find_grid_rule(inputs, 1024, patch_size=(1, 1, 1)).rule == GridRule(
        "latent", ("hidden_states",), (2, 3, 4), (1, 1, 1)
    )
    assert find_grid_rule(inputs, 1024, patch_size=(2, 1, 1)).rule == GridRule(
        "latent", ("hidden_states",), (1, 3, 4), (2, 1, 1)
    )
    # the same grid: the patch of one frame is preferred
    unknown = find_grid_rule(inputs, 1024, conv_grids=[(16, 16)])
    assert unknown.rule == GridRule("latent", ("hidden_states",), (2, 3, 4), (1, 1, 1))


AMBIGUOUS = (1, 8, 8, 4, 8)  # (B, C, T, H, W): 8 x 4 x 8, or (B, T, H, W, C): 8 x 8 x 4


def test_ambiguous_grids_are_no_rule() -> None:
    found = find_grid_rule(_video(*AMBIGUOUS), 256, patch_size=1)
    assert found.rule is None
    assert "several grids" in found.reason
    for grid in ("8x4x8", "8x8x4"):
        assert grid in found.reason


@pytest.mark.parametrize(("conv", "axes"), [((8, 8, 4), (1, 2, 3)), ((4, 8), (2, 3, 4))])
def test_a_convolution_decides_between_grids(conv: tuple[int, ...], axes: Grid) -> None:
    found = find_grid_rule(_video(*AMBIGUOUS), 256, patch_size=1, conv_grids=[conv])
    assert found.rule == GridRule("latent", ("hidden_states",), axes, (1, 1, 1))


def test_as_many_frames_as_channels_counts_as_channels_first() -> None:
    inputs = _video(1, 4, 4, 12, 18)
    found = find_grid_rule(inputs, 216, patch_size=2)
    assert found.rule is not None
    assert found.rule.axes == (2, 3, 4)
    # where that was wrong, the next call with another number of frames shows it
    with pytest.raises(GridMismatchError, match="does not match"):
        read_grid(found.rule, _video(1, 6, 4, 12, 18), 324)


def test_the_first_of_several_latents_is_read() -> None:
    inputs = {"hidden_states": LATENT, "control_hidden_states": LATENT}
    found = find_grid_rule(inputs, TOKENS, patch_size=2)
    assert found.rule is not None
    assert found.rule.names == ("hidden_states",)


def test_fake_inputs_do() -> None:
    with FakeTensorMode():
        inputs = {"x": torch.empty(1, 16, 21, 60, 104)}
        found = find_grid_rule(inputs, TOKENS, patch_size=2)
    assert found.rule is not None
    json.dumps(found.rule.to_dict())


# ---------------------------------------------------------------- rules

EVERY_KIND = [
    GridRule("latent", ("x",), (1, 3, 4), (2, 2, 2)),
    GridRule("arguments", ("num_frames", "height", "width")),
    GridRule.fixed((21, 30, 52)),
]


@pytest.mark.parametrize("rule", EVERY_KIND, ids=lambda rule: rule.kind)
def test_json_round_trip(rule: GridRule) -> None:
    again = GridRule.from_dict(json.loads(json.dumps(rule.to_dict())))
    assert again == rule
    assert hash(again) == hash(rule)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "kind"),
        ({"kind": "latent", "names": ["x"], "axes": [2, 3, 4]}, "patch"),
        ({"kind": "latent", "names": ["x"], "axes": [2, 3, 3], "patch": [1, 1, 1]}, "axes"),
        ({"kind": "latent", "names": ["x"], "axes": [2, 3, 5], "patch": [1, 1, 1]}, "axes"),
        ({"kind": "latent", "names": ["x"], "axes": [2, 3, 4], "patch": [1, 0, 1]}, "patch"),
        ({"kind": "latents"}, "'latents'"),
        ({"kind": "arguments", "names": ["h", "w"]}, "3 argument names"),
        ({"kind": "arguments", "names": ["t", "h", "w"], "size": [1, 2, 3]}, "size"),
        ({"kind": "arguments", "names": "thw"}, "names"),
        ({"kind": "fixed", "sizes": [1, 2, 3]}, "Did you mean 'size'"),
        ({"kind": "fixed", "size": [1, 2, 3.0]}, "size"),
        ({"kind": "fixed", "size": 3}, "size"),
    ],
)
def test_wrong_rules_are_rejected(values: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GridRule.from_dict(values)


@pytest.mark.parametrize(
    ("rule", "inputs"),
    [
        (EVERY_KIND[0], {}),
        (EVERY_KIND[0], {"x": None}),
        (EVERY_KIND[0], {"x": torch.empty(2, 3, 4)}),
        (EVERY_KIND[0], {"x": []}),
        (EVERY_KIND[1], {"num_frames": 3, "height": 4}),
        (EVERY_KIND[1], {"num_frames": 3, "height": 4, "width": 5.0}),
        (EVERY_KIND[1], {"num_frames": 3, "height": 4, "width": True}),
        (EVERY_KIND[1], {"num_frames": 3, "height": 4, "width": torch.tensor(5)}),
    ],
)
def test_calls_that_a_rule_cannot_read(rule: GridRule, inputs: dict[str, Any]) -> None:
    with pytest.raises(GridMismatchError, match=r"argument '\w+'.*grid=\(T, H, W\)"):
        rule.grid(inputs)


def test_what_the_user_says() -> None:
    assert checked_grid([3, 4, 5]) == (3, 4, 5)
    assert read_grid((3, 4, 5), {}, 60) == (3, 4, 5)
    assert read_grid(lambda named: (named["n"], 4, 5), {"n": 3}, 60) == (3, 4, 5)
    assert read_grid(GridRule.fixed([3, 4, 5]), {}, 60) == (3, 4, 5)


@pytest.mark.parametrize(
    "value", [None, 60, "345", (3, 4), (3, 4, 0), (3, 4, 5.0), (True, 4, 5), (3, 4, -5), {3, 4, 5}]
)
def test_what_is_no_grid(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"three integers \(T, H, W\)"):
        checked_grid(value)
    with pytest.raises(ConfigError, match=r"three integers \(T, H, W\)"):
        read_grid(lambda _: value, {})


def test_a_grid_that_does_not_match() -> None:
    with pytest.raises(GridMismatchError, match="3x4x5 is 60, and attention has 61 video tokens") as error:
        checked_grid((3, 4, 5), 61)
    assert isinstance(error.value, SaladError | ValueError)
    assert "function" in str(error.value)
