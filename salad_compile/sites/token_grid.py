"""Say which token grid runs, for programs that call parts of a converted model and never its forward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch.nn as nn

from salad_compile.errors import require_conversion
from salad_compile.grid.sizes import check_grid
from salad_compile.sites.branch import branches


@contextlib.contextmanager
def token_grid(model: nn.Module, size: Sequence[int]) -> Iterator[None]:
    """Inside, the sites of `model` that run in this thread see a video of this grid.

    Needed where a pipeline calls the blocks of a model itself (DiffSynth's do). A forward of the whole model reads its
    own grid, here as everywhere.

    Args:
        model: a converted module.
        size: (T, H, W), the tokens of the video along time, height and width.

    Raises:
        NotConvertedError: the model is not converted. ConfigError: the size is not three positive integers.
    """
    sites = branches(model)
    require_conversion(bool(sites), type(model).__name__)
    grid = check_grid(size)
    with contextlib.ExitStack() as held:
        for video in {site.grid for site in sites.values() if site.grid is not None}:
            device = next(parameter.device for parameter in model.parameters())
            held.enter_context(video.hold(grid, device))
        yield
