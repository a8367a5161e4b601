"""Scales that a graph computes: from its length, or by NumPy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import salad_compile
from tests.salad_compile.calls.test_softmax_products import Attention, in_graph, x
from tests.support import TINY, Recorder, randomise_branches, relative_error

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def by_length(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=2 * q.shape[2] ** -0.5)


def divided_by_length(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT) * 8 / q.shape[2]).softmax(-1) @ v


def numpy_root(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=0.7 / np.sqrt(q.shape[-1]))


def numpy_divisor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / np.sqrt(q.shape[-1])).softmax(-1) @ v


@pytest.mark.parametrize("attend", [by_length, divided_by_length, numpy_root, numpy_divisor])
def test_compiled_equals_uncompiled_at_every_length(attend: Attend) -> None:
    model = salad_compile.convert(Attention(attend), TINY, example_inputs=(x(),))
    randomise_branches(model)
    recorder = Recorder()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=recorder)
    with torch.no_grad():
        for length in (100, 131, 97):
            tokens = torch.randn(1, length, 16, generator=torch.Generator().manual_seed(length))
            assert relative_error(compiled(tokens), model(tokens)) <= 1e-5
    assert recorder.graphs == recorder.after["salad.block_sparse_attention"] > 0


def test_a_scale_that_is_a_tensor_stays_dense_in_graphs_and_says_so() -> None:
    scale = np.float64(0.3)  # Dynamo makes a tensor of it
    model = Attention(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=scale))
    (call,) = in_graph(model)
    assert "its scale is a tensor in the graph" in call.reason
