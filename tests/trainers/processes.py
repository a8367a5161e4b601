"""Run a function in processes that know each other, through gloo or, with a GPU for each, NCCL."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.end_to_end.train_life import forkserver

WORLD = 2


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return int(unused.getsockname()[1])


def in_two_processes(function: Callable[[int, Path], None], folder: Path, backend: str | None = "gloo") -> None:
    """:func:`in_processes`, two."""
    in_processes(WORLD, function, folder, backend)


def in_processes(world: int, function: Callable[[int, Path], None], folder: Path, backend: str | None = "gloo") -> None:
    """`function(rank, folder)` in each; what it raises is raised here. The environment is what torchrun sets.

    backend: None where the function makes its group itself. It cannot replace one of ours: the second process may
    meet the store of the first group, which is about to close.
    """
    forkserver()
    arguments = (world, function, folder, free_port(), backend)
    mp.start_processes(_run, args=arguments, nprocs=world, start_method="forkserver")


def _run(
    rank: int, world: int, function: Callable[[int, Path], None], folder: Path, port: int, backend: str | None
) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo",
    )  # fmt: skip
    if backend == "nccl":
        torch.cuda.set_device(rank)
    if backend is None:
        function(rank, folder)
        return
    dist.init_process_group(backend, timeout=timedelta(seconds=600))
    try:
        function(rank, folder)
        dist.barrier()  # the first process holds the store, from which another may still be making its last group
    finally:
        dist.destroy_process_group()
