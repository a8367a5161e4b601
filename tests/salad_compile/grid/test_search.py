"""Finding the grid rule of a model from one call."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from salad_compile.errors import GridMismatchError
from salad_compile.grid.rule import GridRule, read_grid
from salad_compile.grid.search import find_grid_rule
from salad_compile.grid.sizes import Grid

# ---------------------------------------------------------------- finding the grid

LATENT = torch.empty(1, 16, 21, 60, 104, device="meta")
GRID = (21, 30, 52)
TOKENS = 21 * 30 * 52


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
