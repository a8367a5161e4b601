"""The token order of the video that a converted model is running on: set by its root's forward, read by its branches.

The order is data: an int32 tensor (2, V), a permutation and its inverse, whose length says how many tokens are video.
So one compiled block serves all resolutions, and a site of a joint sequence knows how much of it is text.

It belongs to one call. A thread sees the order of the forward that it runs, and none outside of one: a site that runs
while its root does not, because it was bypassed or its forward was replaced, has no order and must not guess one. Code
that recomputes activations runs in a backward pass, maybe in another thread: there the root's output brings the order.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils._pytree import tree_leaves

from salad_compile.common.foreign_hooks import forward_slot
from salad_compile.common.signatures import argument_names
from salad_compile.errors import GridMismatchError
from salad_compile.grid.orders import OrderOf, cached_order
from salad_compile.grid.rule import GridSource, read_grid
from salad_compile.grid.sizes import Grid

Orders = Mapping[str, Tensor]


class _Running:
    """What runs in a thread.

    Attributes:
        orders: of the forward that runs, by the name of what made them; None if none does.
        size: of its video.
        task: the backward pass that brought them, if one did.
    """

    def __init__(self) -> None:
        # For each thread anew, and no defaults of the class: Dynamo would take those for constants.
        self.orders: Orders | None = None
        self.size: Grid | None = None
        self.task: int | None = None


class _Threads(threading.local):
    """What runs in each thread: an object of its own, because Dynamo loses what is written into a threading.local."""

    def __init__(self) -> None:
        self.running = _Running()


class VideoGrid:
    """One for each converted model.

    Args:
        source: how to read the grid from the arguments of the root's forward.
        makers: make the orders that its sites ask for, see :data:`salad_compile.grid.orders.OrderOf`.

    Attributes:
        size: of the latest forward, for pictures.
    """

    def __init__(self, source: GridSource, makers: Iterable[OrderOf]) -> None:
        self.source = source
        self.makers = {make.__name__: make for make in makers}
        self.size: Grid | None = None
        self._threads = _Threads()
        self._sizes: set[Grid] = set()  # of all forwards, up to two of them

    @property
    def running(self) -> _Running:
        """What this thread runs."""
        running: _Running = self._threads.running
        return running

    def read(self, inputs: Mapping[str, Any]) -> tuple[Grid, Orders]:
        """The grid and the orders for a forward with these arguments."""
        grid = read_grid(self.source, inputs)
        device = next((v.device for v in inputs.values() if isinstance(v, Tensor)), torch.device("cpu"))
        if not torch.compiler.is_compiling():  # symbolic sizes would outlive their graph
            self.size = grid
            if len(self._sizes) < 2:
                self._sizes.add(grid)
        return grid, self.orders_of(grid, device)

    def orders_of(self, grid: Grid, device: torch.device) -> Orders:
        """The orders that the sites ask for, of one grid."""
        return {name: cached_order(make, grid, device) for name, make in self.makers.items()}

    @contextlib.contextmanager
    def hold(self, grid: Grid, device: torch.device) -> Iterator[None]:
        """A video of this grid runs in this thread, whether or not the root does."""
        before = self.running.orders, self.running.size
        self.running.orders, self.running.size = self.orders_of(grid, device), grid
        try:
            yield
        finally:
            self.running.orders, self.running.size = before

    def recomputed(self, device: torch.device) -> Orders | None:
        """The orders for code that a backward pass runs again and to which no output brought any; None elsewhere.

        Where all forwards had one grid, there is no other. Uncompiled code only.
        """
        if backward_pass() is None or len(self._sizes) != 1:
            return None
        return self.orders_of(next(iter(self._sizes)), device)

    def bring_along(self, out: Any, grid: Grid, orders: Orders) -> None:
        """Let the backward pass of a forward that returned `out` run with the forward's order."""
        nodes = {leaf.grad_fn for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and leaf.grad_fn is not None}
        for node in nodes:
            node.register_prehook(lambda _: self._begin_backward(grid, orders))

    def _begin_backward(self, grid: Grid, orders: Orders) -> None:
        running = self.running  # of the thread in which this part of the backward pass runs
        task = backward_pass()
        if running.task != task:
            values, before = running.__dict__, dict(running.__dict__)
            # private: runs at the end of this backward pass, in whichever thread. Seen in torch 2.11 and 2.13;
            # grid/test_private_names.py fails when it moves.
            torch.autograd.Variable._execution_engine.queue_callback(lambda: values.update(before))
        running.orders, running.size, running.task = orders, grid, task

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_threads"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _threads=_Threads())


class RootForward:
    """What stands in the place of a converted model's `forward`: sets the order, then calls the original.

    An object and not a bound method, because pipelines and trainers ask for the signature of `model.forward`.
    """

    def __init__(self, root: nn.Module, grid: VideoGrid) -> None:
        chained = forward_slot(root).get()
        # see `SaladBranch.attach` for why the class's function is kept
        self.original: Callable[..., Any] = type(root).forward if chained is None else chained
        self.bound: tuple[nn.Module, ...] = (root,) if chained is None else ()
        self.is_allowed_in_graph = is_allowed_in_graph(type(root))
        self.grid = grid
        self.names = argument_names(root.forward)

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

    def _original(self) -> Callable[..., Any]:
        """What the root's forward would be without this; caches replace it on the class.

        Of a class that is allowed in graphs (diffusers does that), compiled, what it was at conversion: Dynamo does not
        look `forward` up on such a class.
        """
        if not self.bound or (self.is_allowed_in_graph and torch.compiler.is_compiling()):
            return self.original
        return type(self.bound[0]).forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        grid, running = self.grid, self.grid.running
        # by hand, because Dynamo does not trace Signature.bind
        size, orders = grid.read({**dict(zip(self.names, args, strict=False)), **kwargs})
        before, size_before = running.orders, running.size
        running.orders, running.size = orders, size
        try:
            out = self._original()(*self.bound, *args, **kwargs)
        finally:
            running.orders, running.size = before, size_before
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():
            grid.bring_along(out, size, orders)
        return out


def is_allowed_in_graph(cls: type) -> bool:
    """Whether `torch._dynamo.allow_in_graph` was called on a class."""
    # private: is_callable_allowed. Seen in torch 2.13; grid/test_private_names.py fails when it moves. Not imported:
    # a class is allowed by a call that loads Dynamo.
    rules = sys.modules.get("torch._dynamo.trace_rules")
    return rules is not None and bool(rules.is_callable_allowed(cls))


def backward_pass() -> int | None:
    """The number of the backward pass that this thread is in; None if it is in none."""
    # private: -1 outside of one. Seen in torch 2.11 and 2.13; grid/test_private_names.py fails when it moves.
    number = torch._C._current_graph_task_id()
    return None if number == -1 else number


def order_error(site: str) -> GridMismatchError:
    """A site runs whose model's forward, which reads the token grid, does not."""
    return GridMismatchError(
        f"{site}: the order of the video's tokens is not known, because the forward of the converted model does not "
        "run around this site. It was bypassed (a function that calls the model's blocks), or model.forward was "
        "replaced after conversion. Call the model itself, convert after replacing its forward, or say which grid "
        "runs: with salad_compile.token_grid(model, (T, H, W)): ..."
    )
