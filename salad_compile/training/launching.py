"""Training processes on this machine without an external launcher: DDP of `salad-compile train --processes N`.

torch's elastic launcher, on which torchrun and `accelerate launch` stand, keeps a function's processes waiting for
30 seconds when a signal ends them early. Several machines, and FSDP2, take those launchers.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

from salad_compile.errors import TrainingError
from salad_compile.training.interrupts import HANGUP, Terminal, signals_to_handle

GRACE_SECONDS = 5.0  # for the others, when one has failed


def run_processes(function: Callable[..., None], arguments: tuple[Any, ...], count: int, start_method: str) -> int:
    """`function(*arguments)` in `count` processes, under the environment of torch.distributed; returns when all ended.

    SIGTERM, SIGINT and SIGHUP are forwarded. If this process dies, the others are stopped too.

    Returns:
        The number of the first signal that was forwarded, or 0.

    Raises:
        TrainingError: one ended with an error; the others were ended.
    """
    from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, start_processes

    context = start_processes(  # type: ignore[no-untyped-call]
        _process,
        args=(function, arguments, count, _free_port()),
        nprocs=count,
        join=False,
        start_method=start_method,
    )
    with _forward_signals(context.processes) as came:
        try:
            while not context.join(grace_period=GRACE_SECONDS):
                pass
        except ProcessExitedException as error:
            why = "its own message is above"
            if error.signal_name is not None:
                why = "from outside, or for want of memory; the same command goes on from the newest checkpoint"
            raise TrainingError(f"{error}; {why}.") from error
        except ProcessRaisedException as error:
            raise TrainingError(f"process {error.error_index} failed: {error}") from error
    return came[0] if came else 0


def _process(rank: int, function: Callable[..., None], arguments: tuple[Any, ...], count: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if "OMP_NUM_THREADS" not in os.environ:  # else each would take all cores
        import torch

        torch.set_num_threads(max(1, torch.get_num_threads() // count))
    function(*arguments)


def _free_port() -> int:
    """Free at this moment; the process of rank 0 takes it."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return int(unused.getsockname()[1])


@contextlib.contextmanager
def _forward_signals(processes: list[Any]) -> Iterator[list[int]]:
    """Yields the numbers of the signals that came."""
    came: list[int] = []
    terminal = Terminal()

    def hand_on(number: int, frame: Any) -> None:
        came.append(number)
        if number == HANGUP:
            terminal.leave()
        for process in processes:
            if process.is_alive():
                os.kill(process.pid, number)

    before = {number: signal.signal(number, hand_on) for number in signals_to_handle()}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
