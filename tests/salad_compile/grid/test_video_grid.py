"""The token grid of a converted model: where it comes from, who shares it, and what happens when it does not fit."""

from __future__ import annotations

import copy
import inspect
import logging
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import salad_compile
from salad_compile.errors import ConfigError, GridMismatchError, SaladError
from salad_compile.grid.orders import tile_order
from salad_compile.grid.rule import GridRule
from salad_compile.grid.video_grid import RootForward
from salad_compile.sites.branch import branches
from tests import toys
from tests.salad_compile.conversion.test_convert import assert_unchanged, fingerprint
from tests.support import Recorder, assert_same, randomise_branches, relative_error, run

CONFIG = salad_compile.SaladConfig(
    compensation="none", sparsity=0.7, query_block=16, key_block=16, lora_rank=2, min_tokens=64
)


class Clip(nn.Module):
    """(B, 3, T, H, W) in patches of (1, 2, 2) -> tokens; two self-attentions."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv3d(3, toys.WIDTH, (1, 2, 2), (1, 2, 2))
        self.body = toys.Stack(toys.SelfAttention(), toys.SelfAttention())

    def forward(self, video: Tensor, strength: float = 1.0, *, note: str = "") -> Tensor:
        out: Tensor = self.body(self.patch(video).flatten(2).transpose(1, 2) * strength)
        return out


def video(t: int = 5, h: int = 10, w: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(t)
    return torch.randn(2, 3, t, h, w, generator=generator)


GRID = (5, 5, 6)


def clip(**arguments: Any) -> nn.Module:
    torch.manual_seed(1)
    model = salad_compile.convert(Clip(), CONFIG, **{"example_inputs": {"video": video()}, **arguments})
    randomise_branches(model)
    return model


def grids_of(model: nn.Module) -> set[Any]:
    return {branch.grid for branch in branches(model).values()}


def orders_in(model: nn.Module, x: Tensor) -> Tensor:
    """The tile order and its inverse that the sites see in a forward."""
    (grid,) = grids_of(model)
    seen: list[Tensor] = []
    hook = model.body.register_forward_pre_hook(lambda *_: seen.append(grid.running.orders["tile_order"]))
    model(x)
    hook.remove()
    assert grid.running.orders is None, "the order outlives its forward"
    return seen[0]


def from_arguments(arguments: Mapping[str, Any]) -> tuple[int, int, int]:
    _, _, t, h, w = arguments["video"].shape
    return (t, h // 2, w // 2)


# --- where it comes from ---------------------------------------------------------------------------------------------


def test_the_grid_is_found_and_decides_what_is_attended() -> None:
    model = clip()
    (grid,) = grids_of(model)
    assert isinstance(grid.source, GridRule)
    assert (grid.source.kind, grid.source.names, grid.source.patch) == ("latent", ("video",), (1, 2, 2))
    out = model(video())
    order, inverse = orders_in(model, video())
    assert torch.equal(order, tile_order(GRID))
    assert torch.equal(order[inverse.long()], torch.arange(150, dtype=torch.int32))
    for branch in branches(model).values():
        assert branch.record.on_grid
        branch.grid = None
    assert relative_error(model(video()), out) > 1e-3, "the flat order selects the same blocks: the test is vacuous"


@pytest.mark.parametrize("grid", [GRID, list(GRID), from_arguments])
def test_the_users_grid_is_the_grid(grid: Any) -> None:
    assert torch.equal(clip(grid=grid)(video()), clip()(video()))


def test_a_function_sees_the_arguments_by_name_however_they_are_passed() -> None:
    seen: list[Mapping[str, Any]] = []

    def grid(arguments: Mapping[str, Any]) -> tuple[int, int, int]:
        seen.append(arguments)
        return from_arguments(arguments)

    model = clip(grid=grid)
    x = video()
    for call in (lambda: model(x, 2.0), lambda: model(strength=2.0, video=x), lambda: model(x, strength=2.0)):
        seen.clear()
        call()
        (arguments,) = seen
        assert arguments["video"] is x
        assert arguments["strength"] == 2.0
    seen.clear()
    model(x, note="here")
    assert seen[0].get("note") == "here"


def test_every_resolution_has_its_own_order() -> None:
    model = clip()
    recorder = Recorder({"lowering": "eager"})
    compiled = torch.compile(model, backend=recorder, fullgraph=True)
    for size in ((5, 10, 12), (3, 14, 8), (7, 8, 10), (5, 10, 12)):
        assert relative_error(compiled(video(*size)), model(video(*size))) < 1e-6
        assert torch.equal(orders_in(model, video(*size))[0], tile_order((size[0], size[1] // 2, size[2] // 2)))
    assert recorder.graphs <= 2


def test_transposed_videos_of_one_length_have_different_orders() -> None:
    """Compiled code that kept the order of the first would be silently wrong: the lengths agree."""
    model = clip()
    compiled = torch.compile(model, backend="salad", options={"lowering": "eager"})
    a, b = video(), video().transpose(3, 4).contiguous()
    assert relative_error(compiled(a), model(a)) < 1e-6
    assert relative_error(compiled(b), model(b)) < 1e-6
    by_block = clip()
    for layer in by_block.body.layers:
        layer.compile(backend="salad", options={"lowering": "eager"})
    assert relative_error(by_block(a), model(a)) < 1e-6
    assert relative_error(by_block(b), model(b)) < 1e-6


# --- the root's forward ----------------------------------------------------------------------------------------------


def test_the_root_keeps_its_signature() -> None:
    """Pipelines and trainers ask `inspect.signature(model.forward)` which arguments they may pass."""
    model = clip()
    assert isinstance(model.forward, RootForward)
    assert inspect.signature(model.forward) == inspect.signature(Clip().forward)
    chained = Clip()
    original = chained.forward
    chained.forward = lambda video, flag=False: original(video)  # what hooks of accelerate do
    before = inspect.signature(chained.forward)
    salad_compile.convert(chained, CONFIG, example_inputs={"video": video()})
    assert inspect.signature(chained.forward) == before
    assert chained(video(), flag=True).isfinite().all()


def test_wrong_arguments_are_the_models_own_error() -> None:
    with pytest.raises(TypeError, match=r"strengh|required positional argument"):
        clip(grid=GRID)(strengh=2.0)
    with pytest.raises((TypeError, SaladError), match="video"):
        clip()(strength=2.0)


def pickled(model: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(model))


# each kind of grid through one way of copying; functions are what pickling may lose
@pytest.mark.parametrize(
    ("copier", "grid"),
    [
        pytest.param(copy.deepcopy, None, id="deepcopy-rule"),
        pytest.param(copy.deepcopy, GRID, id="deepcopy-fixed"),
        pytest.param(pickled, from_arguments, id="pickle-function"),
        pytest.param(pickled, None, id="pickle-rule", marks=pytest.mark.all_cases),
        pytest.param(pickled, GRID, id="pickle-fixed", marks=pytest.mark.all_cases),
        pytest.param(copy.deepcopy, from_arguments, id="deepcopy-function", marks=pytest.mark.all_cases),
    ],
)
def test_copies_have_a_grid_of_their_own(copier: Any, grid: Any) -> None:
    model = clip(grid=grid)
    expected = run(model, {"video": video()})
    twin = copier(model)
    assert_same(run(twin, {"video": video()}), expected)
    (ours,), (theirs,) = grids_of(model), grids_of(twin)
    assert ours is not theirs
    assert twin.forward.grid is theirs
    assert twin.forward.bound == (twin,)
    recorder = Recorder()
    torch._dynamo.reset()
    assert_same(run(torch.compile(twin, backend=recorder), {"video": video()}, parameters=twin), expected)
    assert recorder.after["salad.block_sparse_attention"] == 2
    if grid is not GRID:
        size = ours.size
        twin(video(3, 8, 14))
        assert ours.size == size != theirs.size
    randomise_branches(twin, seed=3)
    assert relative_error(twin(video()), expected.output) > 1e-3
    assert_same(run(model, {"video": video()}), expected)


# --- what does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "error", "message"),
    [
        ((5, 10, 12), GridMismatchError, r"5x10x12 is 600, and attention has 150 video tokens"),
        (lambda arguments: (1, 2, 3), GridMismatchError, r"1x2x3 is 6"),
        ((5, 30), ConfigError, r"three integers \(T, H, W\)"),
        ((5, 5, 6.0), ConfigError, r"three integers"),
        ("5x5x6", ConfigError, r"three integers"),
        (lambda arguments: None, ConfigError, r"three integers"),
    ],
)
def test_a_grid_that_does_not_match_leaves_the_model_alone(grid: Any, error: type[SaladError], message: str) -> None:
    model = Clip()
    before = fingerprint(model)
    with pytest.raises(error, match=message):
        salad_compile.convert(model, CONFIG, example_inputs={"video": video()}, grid=grid)
    assert_unchanged(model, before)
    assert "forward" not in model.__dict__


def test_a_function_that_raises_leaves_the_model_alone() -> None:
    model = Clip()
    before = fingerprint(model)
    with pytest.raises(KeyError, match="latents"):
        salad_compile.convert(
            model, CONFIG, example_inputs={"video": video()}, grid=lambda arguments: arguments["latents"].shape[2:]
        )
    assert_unchanged(model, before)


def test_a_fixed_grid_at_another_resolution_is_an_error_compiled_and_not() -> None:
    model = clip(grid=GRID)
    model(video())
    with pytest.raises(SaladError, match="the token grid has 150 tokens and the site 120"):
        model(video(5, 8, 12))
    with pytest.raises(Exception, match=r"150|120"):
        torch.compile(model, backend="salad", options={"lowering": "eager"})(video(5, 8, 12))


def test_two_forwards_before_one_backward_under_checkpointing() -> None:
    """Two videos of one length and different grids: each is recomputed with its own order."""
    a, b = video(), video().transpose(3, 4).contiguous()
    model = clip()
    (model(a).square().sum() + model(b).square().sum()).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    recomputed = clip()
    recomputed.body.recompute = True
    (recomputed(a).square().sum() + recomputed(b).square().sum()).backward()
    for name, parameter in recomputed.named_parameters():
        if name in expected and expected[name].norm() > 0:
            assert relative_error(parameter.grad, expected[name]) < 1e-5, name


# --- saving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [None, GRID], ids=["rule", "fixed"])
def test_rules_are_saved(grid: Any, tmp_path: Path) -> None:
    model = clip(grid=grid)
    salad_compile.save(model, tmp_path)
    torch.manual_seed(1)
    loaded = salad_compile.load(Clip(), tmp_path)
    assert loaded.forward.grid.source == model.forward.grid.source
    assert torch.equal(loaded(video()), model(video()))


def test_functions_are_passed_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = clip(grid=from_arguments)
    with caplog.at_level(logging.WARNING, "salad_compile"):
        salad_compile.save(model, tmp_path)
    assert "load(model, path, grid=...)" in caplog.text
    torch.manual_seed(1)
    loaded = salad_compile.load(Clip(), tmp_path, grid=from_arguments)
    assert torch.equal(loaded(video()), model(video()))
    assert torch.equal(loaded(video(3, 8, 14)), model(video(3, 8, 14)))


def test_loading_without_the_function_is_not_silent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The sites were trained in another order: the numbers would be others."""
    model = clip(grid=from_arguments)
    salad_compile.save(model, tmp_path)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "salad_compile"):
        salad_compile.load(Clip(), tmp_path)
    assert "grid=" in caplog.text


def test_load_takes_a_grid_in_place_of_the_files(tmp_path: Path) -> None:
    model = clip(grid=GRID)
    salad_compile.save(model, tmp_path)
    torch.manual_seed(1)
    loaded = salad_compile.load(Clip(), tmp_path, grid=from_arguments)
    assert torch.equal(loaded(video()), model(video()))
    assert loaded(video(3, 8, 14)).isfinite().all()


def test_loading_into_a_converted_model_with_another_grid(tmp_path: Path) -> None:
    """`grid` of load goes to a model that load converts; one that is converted has its own, which stays."""
    salad_compile.save(clip(), tmp_path)
    other = clip(grid=GRID)
    salad_compile.load(other, tmp_path)
    assert other.forward.grid.source == GridRule.fixed(GRID)


def test_recomputation_keeps_the_order() -> None:
    model = clip()
    expected = run(model, {"video": video()})
    for layer in model.body.layers:
        forward = layer.forward
        layer.forward = lambda x, forward=forward: checkpoint(forward, x, use_reentrant=False)
    assert_same(run(model, {"video": video()}), expected)
