"""The move of values and the means of their pools as one operator: the same results and gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

# Private: a GPU that need not be there (torch 2.11 and 2.13).
from torch._subclasses.fake_tensor import FakeTensorMode

import salad_compile
from salad_compile.passes import pool_values
from tests import toys
from tests.support import Recorder, assert_same, randomise_branches, run

CONFIG = salad_compile.SaladConfig(
    compensation="tail", compensation_pool=32, sparsity=0.6, query_block=16, key_block=16, min_tokens=64
)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Key padding."""
    mask = (torch.arange(k.shape[-2]) < k.shape[-2] - 9).expand(k.shape[0], 1, 1, -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def converted(attend: Callable[..., Tensor] = toys.positional, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    inputs = (toys.tokens(105),)
    config = {**CONFIG.to_dict(), **changes}
    model = salad_compile.convert(toys.SelfAttention(attend), config, example_inputs=inputs, grid=(3, 5, 7))
    randomise_branches(model)
    return model


def counted(model: nn.Module, **options: Any) -> tuple[int, int]:
    """How many means of pools are of moved rows, and how many are operators of their own."""
    recorder = Recorder({"lowering": "eager", **options})
    with torch.no_grad():
        torch.compile(model, backend=recorder, fullgraph=True)(toys.tokens(105))
    return recorder.after["salad.take_rows_with_means"], recorder.after["salad.tail_means"]


@pytest.mark.parametrize("pattern", ["topk", pytest.param("error8", marks=pytest.mark.all_cases)])
def test_results_and_gradients_are_the_same(pattern: str) -> None:
    model, inputs = converted(pattern=pattern), {"x": toys.tokens(105)}
    options = {"lowering": "aot_eager", "prepare_operands": True}
    ours = run(torch.compile(model, backend="salad", options=options, fullgraph=True), inputs, parameters=model)
    assert_same(ours, run(model, inputs))
    torch._dynamo.reset()
    # keys have means of their blocks already, and with `error8` none
    assert counted(model, prepare_operands=True) == ((1, 1) if pattern == "topk" else (2, 0))


@pytest.mark.parametrize("asked", [False, "auto"])
def test_on_the_cpu_it_has_to_be_asked_for(asked: bool | str) -> None:
    assert counted(converted(), prepare_operands=asked) == (0, 2)


@pytest.mark.parametrize(
    "model",
    [lambda: converted(masked), lambda: converted(token_order="flat"), lambda: converted(pattern="stswa")],
    ids=["masked", "not moved", "moved in some heads"],
)
def test_means_of_other_rows_stay(model: Callable[[], nn.Module]) -> None:
    assert counted(model(), prepare_operands=True) == (0, 2)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_by_default_it_is_done_on_a_gpu(device: str) -> None:
    graph = torch.fx.Graph()
    move = graph.placeholder("rows")
    with FakeTensorMode():
        move.meta["example_value"] = torch.empty(1, 2, 4, 8, device=device)
    assert pool_values._is_on_gpu(move) == (device == "cuda")
