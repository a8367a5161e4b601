"""Which items each process reads at each step, and reading them ahead."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch

from salad_compile.errors import ConfigError, LatentItemError, TrainingError
from salad_compile.latents import LatentDataset, LatentItem, ShapeBatches
from salad_compile.training.interrupts import HANGUP
from salad_compile.training.settings import TrainSettings

_GOES_ON = (
    "The checkpoints are as they were: mend its file, or go on with another item in its place (train --skip, in Python "
    'open_latents(..., on_error="skip")).'
)
Placed = tuple[int, LatentItem]  # place in the global batch, item


class Feed:
    """The items of one process, step by step, as a function of the run's seed and the step alone.

    The batch of a step is the same for any number of processes. Place p of it belongs to micro-batch
    p // (micro_batch x processes), and within that to the process whose turn it is.

    Args:
        rank, world: this process, and how many there are.

    Raises:
        ConfigError: the batch cannot be divided, or no shape has items enough for one.
    """

    def __init__(self, latents: LatentDataset, settings: TrainSettings, rank: int, world: int) -> None:
        share = require_divisible(settings, world)
        self.latents, self.settings = latents, settings
        self.batches = ShapeBatches(latents.shapes, settings.batch, seed=settings.seed)  # of all processes together
        self.rank, self.world = rank, world
        self.accumulation = settings.batch // share

    def names(self, step: int) -> list[str]:
        """Of the items of a step's global batch, by place."""
        return [self.latents.names[index] for index in self.batches.at(step)]

    def places(self, rank: int) -> list[list[int]]:
        """Of each micro-batch of a process: its places in the global batch."""
        size = self.settings.micro_batch
        firsts = [(micro * self.world + rank) * size for micro in range(self.accumulation)]
        return [list(range(first, first + size)) for first in firsts]

    def micro_batches(self, first: int) -> Iterator[list[Placed]]:
        """From step `first` on to the end of the run: `accumulation` micro-batches for each step."""
        loader = torch.utils.data.DataLoader(
            _Placing(self.latents),
            batch_sampler=_Places(self, first),
            collate_fn=_as_it_is,
            num_workers=self.settings.workers,
            worker_init_fn=_outlive_signals,
            generator=torch.Generator(),  # of its own, or it would draw from the global one
        )
        with _held_back():  # the processes that it starts inherit that
            return _unfailed(iter(loader))


_ENDS = {signal.SIGTERM}


@contextlib.contextmanager
def _held_back() -> Iterator[None]:
    """SIGTERM waits, in this thread; where `_outlive_signals` cannot tell who sent it, it does not."""
    if sys.platform != "linux":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _outlive_signals(worker: int) -> None:
    """In a process that reads ahead: only the training process ends it, by SIGTERM or by its own end.

    Terminals, `timeout` and job schedulers send their signals to a whole group of processes. The training process then
    finishes its step, for which it still needs this one.
    """
    for number in (signal.SIGINT, HANGUP):
        if number is not None:
            signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None and sys.platform == "linux":  # others have no sigwaitinfo
        signal.pthread_sigmask(signal.SIG_BLOCK, _ENDS)
        threading.Thread(target=_end_by, args=(parent.pid,), daemon=True).start()


def _end_by(process: int) -> None:
    """End this process once that one sends SIGTERM."""
    while signal.sigwaitinfo(_ENDS).si_pid != process:
        pass
    os._exit(0)


@contextlib.contextmanager
def name_dead_readers() -> Iterator[None]:
    """Raises TrainingError: a process that reads ahead was killed, which torch raises wherever the training is."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error  # raised in the middle of a forward, it makes others on its way
        while cause is not None and "DataLoader worker (pid" not in str(cause):  # else it was raised in one
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        raise TrainingError(
            f"a process that reads ahead has died: {str(cause).splitlines()[0].strip(' .')}. The checkpoints are as "
            "they were, and the same command goes on from the newest. Too little memory is the usual reason, or too "
            "little shared memory (docker run --shm-size): --set workers=0 reads in the training process."
        ) from error


def require_divisible(settings: TrainSettings, world: int) -> int:
    """The samples of one forward of all processes together. Raises ConfigError: the batch is no multiple of them."""
    share = settings.micro_batch * world
    if settings.batch % share:
        raise ConfigError(
            f"batch ({settings.batch}) must be a multiple of micro_batch x processes ({settings.micro_batch} x "
            f"{world}): change one of them."
        )
    return share


class _Places:
    """For the loader: lists of (place, index)."""

    def __init__(self, feed: Feed, first: int) -> None:
        self.feed, self.first = feed, first

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.first, self.feed.settings.steps):
            indices = self.feed.batches.at(step)
            for places in self.feed.places(self.feed.rank):
                yield [(place, indices[place]) for place in places]


class _Placing(torch.utils.data.Dataset[Any]):
    """Items by (place, index). An error is handed over as it is: raised in a process, it would be its traceback."""

    def __init__(self, latents: LatentDataset) -> None:
        self.latents = latents

    def __getitem__(self, key: tuple[int, int]) -> Placed | LatentItemError:
        place, index = key
        try:
            return place, self.latents[index]
        except (LatentItemError, OSError) as error:
            return LatentItemError(f"{str(error).rstrip('.')}. {_GOES_ON}")


def _as_it_is(batch: list[Any]) -> list[Any]:
    return batch


def _unfailed(batches: Iterator[list[Any]]) -> Iterator[list[Placed]]:
    """Raises LatentItemError in the place of the first batch that holds one."""
    for batch in batches:
        for each in batch:
            if isinstance(each, LatentItemError):
                raise each
        yield batch
