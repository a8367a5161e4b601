"""Grid rules: what a call shows, JSON, symbolic sizes, and what the user says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from salad_compile.errors import ConfigError, GridMismatchError, SaladError
from salad_compile.grid.orders import cached_order, tile_order
from salad_compile.grid.rule import GridRule, read_grid
from salad_compile.grid.sizes import check_grid

# ---------------------------------------------------------------- rules

EVERY_KIND = [
    GridRule("latent", ("x",), (1, 3, 4), (2, 2, 2)),
    GridRule("arguments", ("num_frames", "height", "width")),
    GridRule.fixed((21, 30, 52)),
]


@pytest.mark.parametrize("rule", EVERY_KIND, ids=lambda rule: rule.kind)
def test_json_round_trip(rule: GridRule) -> None:
    again = GridRule.from_dict(json.loads(json.dumps(rule.to_dict())))
    assert again == rule
    assert hash(again) == hash(rule)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "kind"),
        ({"kind": "latent", "names": ["x"], "axes": [2, 3, 4]}, "patch"),
        ({"kind": "latent", "names": ["x"], "axes": [2, 3, 3], "patch": [1, 1, 1]}, "axes"),
        ({"kind": "latent", "names": ["x"], "axes": [2, 3, 5], "patch": [1, 1, 1]}, "axes"),
        ({"kind": "latent", "names": ["x"], "axes": [2, 3, 4], "patch": [1, 0, 1]}, "patch"),
        ({"kind": "latents"}, "'latents'"),
        ({"kind": "arguments", "names": ["h", "w"]}, "3 argument names"),
        ({"kind": "arguments", "names": ["t", "h", "w"], "size": [1, 2, 3]}, "size"),
        ({"kind": "arguments", "names": "thw"}, "names"),
        ({"kind": "fixed", "sizes": [1, 2, 3]}, "Did you mean 'size'"),
        ({"kind": "fixed", "size": [1, 2, 3.0]}, "size"),
        ({"kind": "fixed", "size": 3}, "size"),
    ],
)
def test_wrong_rules_are_rejected(values: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GridRule.from_dict(values)


@pytest.mark.parametrize(
    ("rule", "inputs"),
    [
        (EVERY_KIND[0], {}),
        (EVERY_KIND[0], {"x": None}),
        (EVERY_KIND[0], {"x": torch.empty(2, 3, 4)}),
        (EVERY_KIND[0], {"x": []}),
        (EVERY_KIND[1], {"num_frames": 3, "height": 4}),
        (EVERY_KIND[1], {"num_frames": 3, "height": 4, "width": 5.0}),
        (EVERY_KIND[1], {"num_frames": 3, "height": 4, "width": True}),
        (EVERY_KIND[1], {"num_frames": 3, "height": 4, "width": torch.tensor(5)}),
    ],
)
def test_calls_that_a_rule_cannot_read(rule: GridRule, inputs: dict[str, Any]) -> None:
    with pytest.raises(GridMismatchError, match=r"argument '\w+'.*grid=\(T, H, W\)"):
        rule.grid(inputs)


def test_what_the_user_says() -> None:
    assert check_grid([3, 4, 5]) == (3, 4, 5)
    assert read_grid((3, 4, 5), {}, 60) == (3, 4, 5)
    assert read_grid(lambda named: (named["n"], 4, 5), {"n": 3}, 60) == (3, 4, 5)
    assert read_grid(GridRule.fixed([3, 4, 5]), {}, 60) == (3, 4, 5)


@pytest.mark.parametrize(
    "value", [None, 60, "345", (3, 4), (3, 4, 0), (3, 4, 5.0), (True, 4, 5), (3, 4, -5), {3, 4, 5}]
)
def test_what_is_no_grid(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"three integers \(T, H, W\)"):
        check_grid(value)
    with pytest.raises(ConfigError, match=r"three integers \(T, H, W\)"):
        read_grid(lambda _: value, {})


def test_a_grid_that_does_not_match() -> None:
    with pytest.raises(GridMismatchError, match="3x4x5 is 60, and attention has 61 video tokens") as error:
        check_grid((3, 4, 5), 61)
    assert isinstance(error.value, SaladError | ValueError)
    assert "function" in str(error.value)


RULES = {
    "latent": GridRule("latent", ("x",), (2, 3, 4), (1, 2, 2)),
    "arguments": GridRule("arguments", ("frames", "height", "width")),
    "function": lambda named: (named["frames"], named["x"].shape[3] // 2, named["width"]),
}


@pytest.mark.parametrize("kind", RULES)
def test_rules_trace_with_symbolic_sizes(kind: str) -> None:
    source = RULES[kind]

    def forward(x: Tensor, frames: int, height: int, width: int) -> Tensor:
        named = {"x": x, "frames": frames, "height": height, "width": width}
        return cached_order(tile_order, read_grid(source, named), x.device) + x.sum()

    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(forward, backend=counter, fullgraph=True, dynamic=True)
    for t, h, w in [(3, 5, 7), (4, 6, 9), (9, 3, 4)]:
        arguments = (torch.ones(1, 2, t, 2 * h, 2 * w), t, h, w)
        assert torch.equal(compiled(*arguments), forward(*arguments))
    assert counter.frame_count == 1


def test_the_check_traces_with_symbolic_sizes() -> None:
    def forward(x: Tensor) -> Tensor:
        grid = RULES["latent"].grid({"x": x})  # type: ignore[attr-defined]
        return tile_order(check_grid(grid, x[0, 0, :, ::2, ::2].numel()))

    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(forward, backend=counter, fullgraph=True, dynamic=True)
    for t, h, w in [(3, 5, 7), (4, 6, 9), (9, 3, 4)]:
        x = torch.ones(1, 2, t, 2 * h, 2 * w)
        assert torch.equal(compiled(x), tile_order((t, h, w)))
    assert counter.frame_count == 1
