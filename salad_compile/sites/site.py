"""One converted site in its place in a model: its parameters, and what it shares with the model's other sites."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from salad_compile.config import SaladConfig
from salad_compile.errors import ConfigError
from salad_compile.grid.video_grid import VideoGrid
from salad_compile.kernels.exchange import splits_heads
from salad_compile.sites.parameters import BranchParameters, Projections
from salad_compile.sites.record import SiteRecord


class DenseSwitch:
    """Whether the sites of a model compute dense attention just now; one object for each model.

    Attributes:
        exchanges: where the tokens are split over processes: an object, one of its attributes, and the value that lets
            dense attention exchange heads for tokens; otherwise it is None (conversion/context_parallel.py).
    """

    def __init__(self) -> None:
        self.dense = False  # not of the class: Dynamo would guard on where it was found
        self.exchanges: list[tuple[Any, str, Any]] = []

    def turn(self, dense: bool) -> None:
        """Dense attention from now on, or SALAD."""
        self.dense = dense
        for owner, attribute, settings in self.exchanges:
            setattr(owner, attribute, settings if dense else None)


class Site(BranchParameters):
    """A site as the eager twin and the passes see it. Hooks and forward override are those of `SaladBranch`.

    Attributes:
        owner_class: of the attention module that this is hung on; set when it is.
    """

    owner_class: type[nn.Module]

    def __init__(self, record: SiteRecord, config: SaladConfig, projections: Projections) -> None:
        super().__init__(record, config, projections)
        self.grid: VideoGrid | None = None  # shared by the sites of a model
        self.switch = DenseSwitch()  # likewise
        self.uncompiled = False  # set when a graph break inside the owner's forward was seen
        self.backend_options: Mapping[str, Any] = {}  # of the compilation that set it
        self.checked_rows: set[torch.Size] = set()  # shapes of the gate's input, see row_check.py
        self.measured_sparsity: float | None = None
        self.engine: str | None = None  # that computed the forward which was measured

    def order(self, device: torch.device) -> Tensor | None:
        """int32 (2, V), the order of the video's tokens and its inverse; None where the grid is not known."""
        if self.grid is None or not self.record.on_grid:
            return None
        orders = self.grid.running.orders
        if orders is None and not torch.compiler.is_compiling():
            orders = self.grid.recomputed(device)
        order = None if orders is None else orders.get(self.order_name)
        # the arguments of the root may lie elsewhere than this layer
        return order if order is None or order.device == device else order.to(device)

    def lacks_order(self, order: Tensor | None) -> bool:
        """Whether this should have an order, and the model's forward, which knows it, does not run."""
        return order is None and self.grid is not None and self.record.on_grid

    def run_uncompiled(self, *args: Any, **kwargs: Any) -> Any:
        """The owner's forward under the eager twin, also while its surroundings are compiled."""
        raise NotImplementedError


def require_switchable(sites: Iterable[Site], dense: bool) -> None:
    """Raises ConfigError where dense attention would see the tokens of one process alone."""
    if dense and (split := next((site for site in sites if splits_heads(site.group)), None)):
        raise ConfigError(
            f"{split.record.owner!r} cannot be dense for a while: its {split.record.heads} heads do not divide by the "
            "processes that share its tokens (parallelise), and diffusers, which dense attention is left to, exchanges "
            "whole heads."
        )


@contextlib.contextmanager
def hold_dense(sites: Iterable[Site], on: bool) -> Iterator[None]:
    """The switches of some sites in one position; afterwards they are as they were. Raises ConfigError."""
    sites = list(sites)
    require_switchable(sites, on)
    before = {site.switch: site.switch.dense for site in sites}
    for switch in before:
        switch.turn(on)
    try:
        yield
    finally:
        for switch, was in before.items():
            switch.turn(was)
