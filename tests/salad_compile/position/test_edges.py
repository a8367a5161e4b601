"""Comparing with a known operation argument by argument tells exactly what comparing edges tells."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from salad_compile.position.edges import KnownArguments, KnownStep, SeenTensors

X, Y = torch.zeros(2, 4), torch.zeros(2, 4)
ARGUMENTS: list[tuple[Any, ...]] = [
    *((X,), (Y,), (X, X), (X, Y), (X, 1), (X, True), (X, 1.0), (X, 0.0), (X, -0.0), (X, None), (X, "a")),
    *((X, torch.float32), (X, torch.float64), (X, (1, 2)), (X, [1, 2]), (X, (1, True)), (X, (1, 2.0))),
    *((X, (..., 1)), (X, (..., True)), (X, (..., slice(0, None, 2))), (X, (..., slice(1, None, 2)))),
    *((X, (..., slice(False, None, 2))), (X, (slice(0, None, 2),)), (X, (..., slice(torch.tensor(0), None, 2)))),
    *((X, (X, X)), (X, (X, Y)), (X, (..., None)), (X, ()), (X, slice(0, None, 2)), (X, Y[:1])),
]


def seen() -> SeenTensors:
    """Where X was seen before."""
    tensors = SeenTensors()
    tensors._tensor(X)
    return tensors


@pytest.mark.parametrize("known", range(len(ARGUMENTS)))
def test_arguments_fit_where_their_edges_are_equal(known: int) -> None:
    edge = seen()._arguments(torch.add, ARGUMENTS[known], {})
    step = KnownArguments(edge, 1)
    for other in ARGUMENTS:
        tensors = seen()
        fits = tensors._fits(step, other, {})
        assert fits == (seen()._arguments(torch.add, other, {}) == edge), other
        again = seen()
        if not fits:  # and nothing is left of the try
            assert tensors._arguments(torch.add, other, {}) == again._arguments(torch.add, other, {})
    assert not seen()._fits(step, ARGUMENTS[known], {"alpha": 2})


KEYWORDS: list[dict[str, Any]] = [
    *({}, {"dim": 0}, {"dim": False}, {"dim": 0.0}, {"dim": -0.0}, {"dim": None}, {"keepdim": 0}, {"dim": (0, 1)}),
    *({"dim": 0, "out": X}, {"out": X, "dim": 0}, {"out": Y}, {"out": Y[:1]}, {"dim": [0, 1]}, {"dtype": torch.int8}),
]


@pytest.mark.parametrize("known", range(len(KEYWORDS)))
def test_keywords_fit_where_their_edges_are_equal(known: int) -> None:
    edge = seen()._arguments(torch.add, (X,), KEYWORDS[known])
    step = KnownArguments(edge, 1)
    for other in KEYWORDS:
        fits = seen()._fits(step, (X,), other)
        assert fits == (seen()._arguments(torch.add, (X,), other) == edge), other


def test_nothing_of_a_model_becomes_text() -> None:
    name = "__import__('os').abort() or 1"  # of an argument, and as the value of one
    step = KnownArguments(seen()._arguments(torch.add, (X, name), {name: name}), 1)
    assert seen()._fits(step, (X, name), {name: name})
    assert not seen()._fits(step, (X, name), {"other": name})


def test_writes_that_nobody_saw_do_not_fit() -> None:
    x = torch.zeros(3)
    tensors = SeenTensors()
    tensors._tensor(x)
    step = KnownArguments(tensors._arguments(torch.neg, (x,), {}), 1)
    assert tensors._fits(step, (x,), {})
    x.add_(1)
    assert not tensors._fits(step, (x,), {})


def results() -> dict[str, Any]:
    base = torch.zeros(2, 4)
    return {
        "new": torch.zeros(2, 4),
        "other shape": torch.zeros(4, 2),
        "other dtype": torch.zeros(2, 4, dtype=torch.float64),
        "a view": X[:, :],
        "itself": X,
        "several": (base, base[1:]),
        "several apart": (base, base[1:].clone()),
        "a parameter": torch.nn.Parameter(torch.zeros(2, 4)),
        "not counted": _inference(),
        "nothing": None,
    }


def _inference() -> Tensor:
    with torch.inference_mode():
        return torch.zeros(2, 4)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", results())
def test_results_fit_where_their_edges_are_equal(name: str, autocast: bool) -> None:
    def edge(tensors: SeenTensors, out: Any) -> Any:
        return tensors._arguments(torch.neg, (X,), {}), tensors._result(out), ("cpu", autocast, torch.bfloat16)

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        known = edge(seen(), results()[name])
        if name == "nothing":
            known = (*known[:2], None)
        step = KnownStep(known, 1, None)
        for other, out in results().items():
            tensors = seen()
            assert tensors._repeats(step, (X,), {}, out) == (other == name), other
            assert len(tensors._tensors) == (1 if other != name else len(tensors._numbers))
    with torch.autocast("cpu", torch.bfloat16, enabled=not autocast):
        assert seen()._repeats(step, (X,), {}, results()[name]) == (name == "nothing")
