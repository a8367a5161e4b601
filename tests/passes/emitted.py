"""Graphs as the passes emit them, and the check of their spec that `tests/conftest.py` switches on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from torch import fx

from salad_compile.config import BackendOptions
from salad_compile.passes.context import Context, graph_modules
from salad_compile.passes.driver import run_passes
from salad_compile.passes.spec import verify


def require_spec(gm: fx.GraphModule, context: Context) -> None:
    """Raises AssertionError if a graph breaks a rule of spec.py; see `salad_compile.passes.driver.Watcher`."""
    for module in graph_modules(gm):
        violations = verify(module.graph, erased="erase_markers" in context.done)
        assert not violations, f"after {context.done[-1]}: {'; '.join(violations)}"


def emitted_graph(model: nn.Module, *inputs: Any, **options: Any) -> fx.Graph:
    """The one graph of a model after the passes."""
    graphs = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        run_passes(gm, BackendOptions.from_options(options), example_inputs)
        graphs.append(gm.graph)
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(*inputs)
    (graph,) = graphs
    return graph
