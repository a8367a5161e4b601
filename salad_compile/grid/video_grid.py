"""The token order of the video that a converted model is running on: set by its root's forward, read by its branches.

The order is data: an int32 tensor (2, V), a permutation and its inverse, whose length says how many tokens are video.
So one compiled block serves all resolutions, and a site of a joint sequence knows how much of it is text.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from salad_compile.grid.orders import OrderOf, cached_order
from salad_compile.grid.rule import GridSource, read_grid
from salad_compile.grid.sizes import Grid


class VideoGrid:
    """One for each converted model.

    Args:
        source: how to read the grid from the arguments of the root's forward.
        makers: make the orders that its sites ask for, see :data:`salad_compile.grid.orders.OrderOf`.
    """

    def __init__(self, source: GridSource, makers: Iterable[OrderOf]) -> None:
        self.source = source
        self.makers = {make.__name__: make for make in makers}
        # of the latest forward; kept for recomputation under checkpointing
        self.size: Grid | None = None
        self.orders: dict[str, Tensor] = {}

    def update(self, inputs: dict[str, Any]) -> None:
        """Set the orders for a forward with these arguments."""
        grid = read_grid(self.source, inputs)
        if not torch.compiler.is_compiling():  # symbolic sizes would outlive their graph
            self.size = grid
        device = next((v.device for v in inputs.values() if isinstance(v, Tensor)), torch.device("cpu"))
        self.orders = {name: cached_order(make, grid, device) for name, make in self.makers.items()}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "orders": {}}


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
