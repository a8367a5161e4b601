"""A process that dies while a video is shared: the other says so, in a sentence and soon, and leaves no half result."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import salad_compile
from salad_compile.kernels import KernelExchangeError
from tests.end_to_end.train_life import forkserver
from tests.trainers.processes import WORLD, free_port
from tests.trainers.test_context_parallel import EAGER, split
from tests.trainers.tiny import converted, generate, pipeline

STEPS = 4


def make_video(rank: int, folder: Path, port: int, compiled: bool) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    dist.init_process_group("gloo", timeout=timedelta(seconds=600))
    model = salad_compile.parallelise(split(converted()))
    if compiled:
        model.compile_repeated_blocks(**EAGER)
    forwards = []

    def die(module: Any, given: Any) -> None:
        forwards.append(module)
        if rank == 1 and len(forwards) == 3:  # in the middle of a video, and between the blocks of a step
            (folder / "died").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)

    model.blocks[1].register_forward_pre_hook(die)
    try:
        torch.save(generate(pipeline(model), STEPS), folder / f"video-{rank}")
    except KernelExchangeError as error:
        (folder / "said").write_text(f"{type(error).__name__}: {error}")
        (folder / "ended").write_text(str(time.time()))
    os._exit(0)  # without the other process a group cannot be taken down


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.all_cases)])
def test_the_other_process_ends_with_a_sentence(tmp_path: Path, compiled: bool) -> None:
    context = forkserver()
    port = free_port()
    processes = [context.Process(target=make_video, args=(rank, tmp_path, port, compiled)) for rank in range(WORLD)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0, -signal.SIGKILL]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["died", "ended", "said"]
    assert "KernelExchangeError: the exchange among the processes 0, 1" in (tmp_path / "said").read_text()
    took = float((tmp_path / "ended").read_text()) - float((tmp_path / "died").read_text())
    assert took < 60
