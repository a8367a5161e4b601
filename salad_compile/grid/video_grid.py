"""The token order of the video that a converted model is running on: set by its root's forward, read by its branches.

The order is data: an int32 tensor (2, V), a permutation and its inverse, whose length says how many tokens are video.
So one compiled block serves all resolutions, and a site of a joint sequence knows how much of it is text.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from salad_compile.grid.orders import cached_order, temporal_order, tile_order
from salad_compile.grid.rule import GridSource, read_grid
from salad_compile.grid.sizes import Grid


class VideoGrid:
    """One for each converted model.

    Args:
        source: how to read the grid from the arguments of the root's forward.
        windowed: whether a site has sliding windows, which run through time in an order of their own.
    """

    def __init__(self, source: GridSource, windowed: bool = False) -> None:
        self.source = source
        self.windowed = windowed
        # of the latest forward; kept for recomputation under checkpointing
        self.size: Grid | None = None
        self.order: Tensor | None = None
        self.temporal_order: Tensor | None = None

    def update(self, inputs: dict[str, Any]) -> None:
        """Set the order for a forward with these arguments."""
        grid = read_grid(self.source, inputs)
        if not torch.compiler.is_compiling():  # symbolic sizes would outlive their graph
            self.size = grid
        device = next((v.device for v in inputs.values() if isinstance(v, Tensor)), torch.device("cpu"))
        self.order = cached_order(tile_order, grid, device)
        if self.windowed:
            self.temporal_order = cached_order(temporal_order, grid, device)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "order": None, "temporal_order": None}


class RootForward:
    """What stands in the place of a converted model's `forward`: sets the order, then calls the original.

    An object and not a bound method, because pipelines and trainers ask for the signature of `model.forward`.
    """

    def __init__(self, root: nn.Module, grid: VideoGrid) -> None:
        chained = root.__dict__.get("forward")
        # see `SaladBranch.attach` for why the class's function is kept
        self.original: Callable[..., Any] = type(root).forward if chained is None else chained
        self.bound: tuple[nn.Module, ...] = (root,) if chained is None else ()
        self.grid = grid
        self.names = tuple(inspect.signature(root.forward).parameters)

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(self.original)
        if not self.bound:
            return signature
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    @property
    def __code__(self) -> types.CodeType:
        """torch.export asks `forward` for it, unless strict=True, to say where a program is from (torch 2.13)."""
        return type(self).__call__.__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # by hand, because Dynamo does not trace Signature.bind
        self.grid.update({**dict(zip(self.names, args, strict=False)), **kwargs})
        return self.original(*self.bound, *args, **kwargs)
