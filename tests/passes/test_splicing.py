"""Spliced nodes know what they compute, as Dynamo's do: AOTAutograd's cache asks for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

import salad_compile
from salad_compile.config import BackendOptions
from salad_compile.passes.driver import run_passes
from salad_compile.passes.provenance import example_value
from tests import toys
from tests.support import randomise_branches

CONFIG = salad_compile.SaladConfig(
    compensation="none", sparsity=0.6, query_block=16, key_block=16, lora_rank=2, min_tokens=48
)


class Check(fx.Interpreter):
    """Runs a graph and holds what each node answers against what was recorded for it."""

    def run_node(self, n: fx.Node) -> Any:
        result, recorded = super().run_node(n), example_value(n)
        if n.op in ("call_function", "call_method"):
            assert recorded is not None, n
            if isinstance(result, Tensor):
                assert isinstance(recorded, FakeTensor)
                assert (result.shape, result.dtype) == (tuple(recorded.shape), recorded.dtype), n
                assert result.stride() == recorded.stride(), n
        return result


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("grid", [None, (3, 5, 7)])
def test_every_node_knows_its_value(grid: Any, dynamic: bool) -> None:
    model = toys.Stack(toys.SelfAttention())
    salad_compile.convert(model, CONFIG, example_inputs=(toys.tokens(105),), grid=grid)
    randomise_branches(model)
    checked = []

    def backend(gm: fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., object]:
        run_passes(gm, BackendOptions.from_options(None), example_inputs)

        def checking(*args: Any) -> Any:
            checked.append(gm)
            with torch.no_grad():
                return gm.forward(*args) if dynamic else Check(gm).run(*args)

        assert all(example_value(n) is not None for n in gm.graph.nodes if n.op in ("call_function", "call_method"))
        return checking

    torch._dynamo.reset()
    torch.compile(model, backend=backend, dynamic=dynamic)(toys.tokens(105))
    assert len(checked) == 1
