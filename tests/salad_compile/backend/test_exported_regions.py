"""Exported programs whose attention lies in regions of another precision, or without gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import salad_compile
from salad_compile.backend.exported_programs import rewrite_exported
from tests import toys
from tests.passes import rotary_styles as styles
from tests.support import count_ops, randomise_branches, relative_error

CONFIG = salad_compile.SaladConfig(
    compensation="none", sparsity=0.6, query_block=16, key_block=16, lora_rank=2, min_tokens=64
)


def full() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", enabled=False)


def narrow() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16)


class Regions(nn.Module):
    """Attention in one region, and its position in another within it."""

    def __init__(self, around: Callable[[], Any], within: Callable[[], Any]) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(styles.WIDTH, styles.WIDTH) for _ in range(4))
        self.around, self.within = around, within

    def place(self, x: Tensor) -> Tensor:
        with self.within():
            angle = styles.angles(x.shape[1], torch.float32, 3)
            turned: Tensor = styles.turned(styles.heads(x).float(), angle)
            return turned @ torch.eye(turned.shape[-1])  # in bf16 where the region is

    def forward(self, x: Tensor) -> Tensor:
        with self.around():
            q, k, v = self.place(self.q(x)), self.place(self.k(x)), styles.heads(self.v(x))
            out = nn.functional.scaled_dot_product_attention(q.type_as(v), k.type_as(v), v)
            joined: Tensor = self.out(out.transpose(1, 2).flatten(2))
        return x + joined.to(x.dtype)


REGIONS = {"none": nullcontext, "full": full, "narrow": narrow, "no gradients": torch.no_grad}


def region(target: Any) -> bool:
    return "wrap_with" in str(target)


@pytest.mark.parametrize(
    ("around", "within"),
    [
        pytest.param(*pair, marks=() if pair == ("narrow", "full") else pytest.mark.all_cases)
        for pair in itertools.product(REGIONS, REGIONS)
    ],
)
def test_regions_are_rewritten_as_one_graph(around: str, within: str) -> None:
    torch.manual_seed(0)
    model = toys.Stack(Regions(REGIONS[around], REGIONS[within])).eval()
    salad_compile.convert(model, CONFIG, example_inputs=(toys.tokens(),))
    randomise_branches(model)
    lengths = {"x": {1: torch.export.Dim("tokens", min=64, max=512)}}
    program = torch.export.export(model, (toys.tokens(),), dynamic_shapes=lengths)
    nested = [module for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    found = [node for module in nested for node in module.graph.nodes if region(node.target)]
    rewritten = rewrite_exported(program)
    assert bool(found) == ((around, within) != ("none", "none"))
    assert [node for module in nested for node in module.graph.nodes if region(node.target)] == found, "it was changed"
    assert count_ops(rewritten.graph_module)["salad.block_sparse_attention"] == 1
    for count in (70, 133):
        x = toys.tokens(count)
        with torch.no_grad():
            expected = model(x)
        actual = rewritten.module()(x)
        assert actual.dtype == expected.dtype
        assert relative_error(actual, expected) < 1e-6  # also in bf16: each operation has the precision that it had
