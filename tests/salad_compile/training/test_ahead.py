"""What is made in a thread: the same values in the same order, its errors, and its end."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from salad_compile.errors import TrainingError
from salad_compile.latents import LatentDataset, LatentItem
from salad_compile.training import read_log, train
from salad_compile.training.ahead import Ahead, ahead
from tests.salad_compile.training.tiny import SETTINGS, converted, latents, wan_forward


def test_values_come_in_their_order_and_end() -> None:
    with Ahead(iter(range(20)), 3) as values:
        assert list(values) == list(range(20))
        assert list(values) == []


def test_the_thread_has_the_device_of_its_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate says "cuda" without a number where there is one process, which `set_device` does not take."""
    chosen: list[object] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for device in ("cuda", "cuda:1"):
        with ahead(iter([]), torch.device(device)) as batches:
            assert list(batches) == []
    assert chosen == [3, 1]


def test_an_error_is_raised_behind_the_values_before_it() -> None:
    def values() -> Iterator[int]:
        yield 1
        raise ValueError("damaged")

    with Ahead(values(), 3) as made:
        assert next(made) == 1
        for _ in range(2):
            with pytest.raises(ValueError, match="damaged"):
                next(made)


def test_no_more_is_made_than_is_asked_for_and_its_depth() -> None:
    taken = []

    def values() -> Iterator[int]:
        for number in range(1000):
            taken.append(number)
            yield number

    before = threading.active_count()
    with Ahead(values(), 2) as made:
        assert [next(made) for _ in range(3)] == [0, 1, 2]
    assert threading.active_count() == before
    assert len(taken) <= 3 + 2 + 1


def test_reading_ahead_changes_no_step(tmp_path: Path) -> None:
    data = latents(tmp_path / "latents")
    logs = []
    for workers in (0, 2):
        settings = dataclasses.replace(SETTINGS, workers=workers, steps=3)
        train(converted(), data, settings, tmp_path / str(workers), validation=data)
        kept = ("step", "loss", "gradient_norm", "validation_loss")
        logs.append([{k: line.get(k) for k in kept} for line in read_log(tmp_path / str(workers))])
    assert logs[0] == logs[1]


class Deadly(LatentDataset):
    """Its reader is killed at the third item, as the system does where memory runs out."""

    def __init__(self, data: LatentDataset) -> None:
        self.data, self.names, self.shapes, self.home = data, data.names, data.shapes, os.getpid()

    def __getitem__(self, index: int) -> LatentItem:
        if index == 2 and os.getpid() != self.home:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.data[index]


def test_a_reader_that_dies_is_one_sentence(tmp_path: Path) -> None:
    data = Deadly(latents(tmp_path / "latents"))
    settings = dataclasses.replace(SETTINGS, workers=1, steps=12)
    with pytest.raises(
        TrainingError, match=r"a process that reads ahead has died: DataLoader worker \(.*--set workers=0"
    ):
        train(converted(), data, settings, tmp_path / "run", forward=wan_forward)
