"""`python -m tests.fuzz races --seconds 60`: threads and processes save to one path and load from it, whole files."""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

import salad_compile
from salad_compile.sites.branch import branches
from tests.models.zoo import CASES
from tests.support import converted, randomise_branches


def _one_value(number: int) -> Any:
    """A model whose branches hold one number everywhere, by which a mixture of two files would show."""
    model = converted(CASES["Wan"])
    randomise_branches(model, seed=number)
    with torch.no_grad():
        for branch in branches(model).values():
            for parameter in branch.parameters():
                parameter.fill_(number)
    return model


def _work(target: Path, end: float, number: int, found: list[Any]) -> None:
    """Save and load in turns; (saves, loads, faults)."""
    saved, read = _one_value(number), _one_value(0)
    saves, loads, faults = 0, 0, []
    while time.monotonic() < end:
        try:
            salad_compile.save(saved, target)
            saves += 1
            salad_compile.load(read, target)
            loads += 1
            values = {
                float(p.detach().flatten()[0]) for b in branches(read).values() for p in b.parameters() if p.numel()
            }
            if len(values) != 1:
                faults.append(f"a mixture of {values}")
        except Exception as error:
            faults.append(f"{type(error).__name__}: {error}")
    found.append((saves, loads, faults))


def _threads(target: Path, end: float, first: int, count: int, queue: Any) -> None:
    torch.set_num_threads(1)
    found: list[Any] = []
    threads = [threading.Thread(target=_work, args=(target, end, first + i, found)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    queue.put(found)


def run(seconds: float, threads: int, processes: int) -> tuple[int, int, list[str]]:
    """Saves, loads, and what went wrong; the first process has `threads` threads, the others one each."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    with tempfile.TemporaryDirectory() as place:
        target = Path(place) / "salad.safetensors"
        salad_compile.save(_one_value(1), target)
        end = time.monotonic() + seconds
        counts = [threads] + [1] * processes
        workers = [
            context.Process(target=_threads, args=(target, end, 1 + 20 * i, count, queue))
            for i, count in enumerate(counts)
        ]
        for worker in workers:
            worker.start()
        found = [each for _ in workers for each in queue.get()]
        for worker in workers:
            worker.join()
        left = [path.name for path in Path(place).iterdir() if path != target]
    faults = [fault for *_, mine in found for fault in mine] + [f"left: {name}" for name in left]
    if len(found) != threads + processes:
        faults.append(f"{len(found)} workers came to their end")
    return sum(saves for saves, *_ in found), sum(loads for _, loads, _ in found), faults


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--processes", type=int, default=4)


def main(arguments: argparse.Namespace) -> int:
    saves, loads, faults = run(arguments.seconds, arguments.threads, arguments.processes)
    print(f"{saves} saves, {loads} loads, {len(faults)} faults", *faults[:10], sep="\n")
    return int(bool(faults))
