"""The emitted graph of one attention module for each pattern and each way of position, line by line.

After a change that is meant: `pytest tests/passes/test_golden.py --update-golden`, and read the difference.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import salad_compile
from salad_compile.passes.spec import OPERATORS
from tests import toys
from tests.passes import rotary_styles as styles
from tests.passes.emitted import emitted_graph
from tests.passes.golden_text import golden_text

GOLDEN = Path(__file__).with_name("golden")
CONFIG = salad_compile.SaladConfig(
    compensation="none", sparsity=0.6, query_block=16, key_block=16, lora_rank=0, min_tokens=64
)
CASES: dict[str, dict[str, Any]] = {
    "topk_map_then_rotate": {"rope_placement": "map-then-rotate"},
    "topk_prepared": {"rope_placement": "map-then-rotate"},
    "topk_rotate_then_map": {"rope_placement": "rotate-then-map"},
    "stswa_map_then_rotate": {"pattern": "stswa", "rope_placement": "map-then-rotate"},
    "stswa_rotate_then_map": {"pattern": "stswa", "rope_placement": "rotate-then-map"},
    "tail": {"rope_placement": "rotate-then-map", "compensation": "tail", "compensation_pool": 32},
    "tail_prepared": {"rope_placement": "map-then-rotate", "compensation": "tail", "compensation_pool": 32},
    "error8": {"rope_placement": "rotate-then-map", "pattern": "error8"},
    "text_in_the_sequence": {"rope_placement": "rotate-then-map"},
}


def text_of(name: str) -> str:
    inputs: tuple[Tensor, ...] = (toys.tokens(105),)
    if name == "training_free":
        options = {"sparsity": 0.6, "query_block": 16, "key_block": 16, "min_tokens": 64}
        return golden_text(emitted_graph(toys.SelfAttention(toys.rotated_in_place), *inputs, **options))
    config = {**CONFIG.to_dict(), **CASES[name]}
    if name == "text_in_the_sequence":
        inputs = (*inputs, toys.tokens(styles.TEXT))
        return golden_text(
            emitted_graph(salad_compile.convert(styles.Single(), config, example_inputs=inputs), *inputs)
        )
    model = toys.Stack(toys.SelfAttention(toys.rotated_in_place))
    salad_compile.convert(model, config, example_inputs=inputs, grid=(3, 5, 7))
    with salad_compile.token_grid(model, (3, 5, 7)):  # its order is an input of the block's graph
        return golden_text(emitted_graph(model.layers[0], *inputs, prepare_operands=name.endswith("_prepared")))


@pytest.mark.parametrize("name", [*CASES, "training_free"])
def test_the_emitted_graph_is_as_it_was(name: str, request: pytest.FixtureRequest) -> None:
    text, file = text_of(name), GOLDEN / f"{name}.txt"
    if request.config.getoption("--update-golden"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    assert text == file.read_text(), "a change that is meant: pytest tests/passes/test_golden.py --update-golden"


def test_every_operator_of_one_process_is_in_a_golden_graph() -> None:
    """A golden graph that lost its attention, or was written for another model, would hold nothing."""
    everything = "".join(file.read_text() for file in GOLDEN.iterdir())
    across_processes = {"gather_tokens", "gather_heads", "own_blocks", "sum_of_processes"}
    across_processes |= {"start_tokens", "finish_tokens", "start_heads", "finish_heads"}
    of_packed_calls = {"require_equal_samples"}
    assert {
        name for name in OPERATORS if f"salad.{name}(" in everything
    } == OPERATORS.keys() - across_processes - of_packed_calls
    assert {file.stem for file in GOLDEN.iterdir()} == {*CASES, "training_free"}
