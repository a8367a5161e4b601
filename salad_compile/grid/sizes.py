"""(T, H, W), the sizes of a video's token grid: the type, and the check of what a user passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from salad_compile.errors import ConfigError, GridMismatchError

Grid = tuple[int, int, int]
"""(T, H, W), each an int, or a SymInt where sizes are symbolic."""

HINT = "Pass grid=(T, H, W), the number of tokens along time, height and width, or a function of forward's arguments."


def check_grid(value: Any, video_tokens: int | None = None) -> Grid:
    """`value` as a grid, if it is one and has the right number of tokens. Traces with symbolic sizes.

    Args:
        value: a tuple or list (T, H, W).
        video_tokens: how many tokens there are; None leaves that unchecked.

    Raises:
        ConfigError: not three integers of 1 or more.
        GridMismatchError: T * H * W is another number than `video_tokens`.
    """
    grid = three_sizes(value, "grid")
    if video_tokens is not None and grid[0] * grid[1] * grid[2] != video_tokens:
        raise GridMismatchError(
            f"the grid does not match the tokens: {show(grid)} is {grid[0] * grid[1] * grid[2]}, and attention has "
            f"{video_tokens} video tokens. The grid counts tokens, after patches are cut, not pixels or latents. "
            "A fixed grid fits one resolution only: for several, pass a function of forward's arguments as grid."
        )
    return grid


def show(grid: Sequence[int]) -> str:
    """`21x30x52`."""
    return "x".join(map(str, grid))


def three_sizes(value: Any, what: str) -> Grid:
    """Three positive integers as a tuple, or a ConfigError that names `what`."""
    if not isinstance(value, tuple | list) or len(value) != 3:
        raise ConfigError(f"{what} is three integers (T, H, W), got {value!r}.")
    for edge in value:
        if isinstance(edge, bool) or not isinstance(edge, int | torch.SymInt) or edge < 1:
            raise ConfigError(f"{what} is three integers (T, H, W) of 1 or more, got {value!r}.")
    return (value[0], value[1], value[2])
