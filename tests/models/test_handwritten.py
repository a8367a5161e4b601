"""What of the hand-written DiTs goes beyond the tests of the zoo (`test_zoo.py`)."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.models.test_zoo import _fresh_dynamo, converted
from tests.models.zoo_handwritten import HANDWRITTEN_CASES
from tests.support import assert_same, run

assert _fresh_dynamo  # a fixture of every test here


def test_attention_dropout_is_left_out_while_training() -> None:
    case = HANDWRITTEN_CASES["handwritten_dropout"]
    model, inputs = converted(case), case.inputs(0)
    expected = run(model, inputs, case.output)
    model.train()
    assert_same(run(model, inputs, case.output), expected)
    compiled = torch.compile(model, backend="salad", options={"lowering": "aot_eager"})
    assert_same(run(compiled, inputs, case.output, parameters=model), expected)


@pytest.mark.parametrize("name", ["handwritten_multihead", "handwritten_flex", "handwritten_manual"])
def test_a_copy_runs_like_the_model(name: str) -> None:
    case = HANDWRITTEN_CASES[name]
    model, inputs = converted(case), case.inputs(0)
    twin = copy.deepcopy(model)
    expected = run(model, inputs, case.output)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_same(run(twin, inputs, case.output), expected)
