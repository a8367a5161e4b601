"""A frozen model in training is told of once, uncompiled and compiled, and one call makes it trainable again."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn as nn

import salad_compile
from salad_compile.errors import NotConvertedError
from salad_compile.sites.branch import branches
from tests.end_to_end.test_compile_matrix import Video, converted, video


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _warnings(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "salad_compile")


def told(caplog: pytest.LogCaptureFixture) -> int:
    """How often it was told since it was asked last."""
    count = sum("nothing of SALAD is being trained" in record.getMessage() for record in caplog.records)
    caplog.clear()
    return count


def frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False)


def plain(model: nn.Module) -> nn.Module:
    return model


def whole(model: nn.Module) -> nn.Module:
    model.compile(backend="salad", fullgraph=True, options={"lowering": "eager"})
    return model


def per_block(model: Video) -> nn.Module:
    for block in model.blocks:
        block.compile(backend="salad", fullgraph=True, options={"lowering": "eager"})
    return model


WAYS = pytest.mark.parametrize("way", [plain, whole, per_block])
TWO_WAYS = pytest.mark.parametrize("way", [plain, per_block])


@WAYS
def test_told_once_by_name(way: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = frozen(way(converted().train()))
    model(**video())
    message = caplog.text
    assert told(caplog) == 1
    assert "blocks.0.attn" in message
    assert "2 converted sites" in message
    model(**video(4, 6, 9))
    assert told(caplog) == 0


@TWO_WAYS
def test_told_when_it_is_frozen_between_two_steps(way: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = way(converted().train())
    model(**video()).sum().backward()
    assert told(caplog) == 0
    frozen(model)
    model(**video())
    assert told(caplog) == 1
    salad_compile.set_trainable(model)
    model(**video()).sum().backward()
    assert told(caplog) == 0
    frozen(model)
    model(**video())
    assert told(caplog) == (way is plain)  # compiled: the graph for frozen parameters is there already


@TWO_WAYS
def test_silent_where_nobody_trains(way: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = frozen(way(converted().train()))
    with torch.no_grad():  # inference, and the mode was forgotten
        model(**video())
    with torch.inference_mode():
        model(**video())
    model.eval()
    model(**video())  # gradients were forgotten
    assert told(caplog) == 0


@TWO_WAYS
def test_silent_where_it_is_meant_or_something_is_trained(way: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = way(converted().train())
    salad_compile.set_trainable(model, False)
    model(**video())
    assert told(caplog) == 0
    assert not any(p.requires_grad for p in model.parameters())
    other = frozen(way(converted().train()))
    next(iter(branches(other).values())).gate_weight.requires_grad_(True)  # type: ignore[union-attr]
    other(**video()).sum().backward()
    assert told(caplog) == 0


def test_each_model_for_itself(caplog: pytest.LogCaptureFixture) -> None:
    student = converted().train()
    teacher = frozen(copy.deepcopy(student))
    student(**video())
    assert told(caplog) == 0
    teacher(**video())
    assert told(caplog) == 1


def test_set_trainable_leaves_the_base_and_takes_wrapped_models_and_pipelines() -> None:
    model = frozen(converted())
    count = salad_compile.set_trainable(torch.compile(model, backend="salad"))
    trainable = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all(".salad." in name for name in trainable)
    assert count == sum(trainable.values()) == sum(p.numel() for b in branches(model).values() for p in b.parameters())

    pipe: Any = SimpleNamespace(transformer=frozen(converted()), transformer_2=nn.DataParallel(frozen(converted())))
    assert salad_compile.set_trainable(pipe) == 2 * count
    salad_compile.set_trainable(pipe, False)
    assert not any(p.requires_grad for p in pipe.transformer_2.parameters())
    with pytest.raises(NotConvertedError):
        salad_compile.set_trainable(Video())
