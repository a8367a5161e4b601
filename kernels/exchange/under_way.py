"""The exchanges that are under way, and what keeps others from running at the same time."""

from __future__ import annotations

from typing import Any

from torch import Tensor

# By the address of what they write: torch.distributed's work, and what it sends.
exchanges: dict[int, tuple[Any, Tensor]] = {}


def follow() -> None:
    """Let what comes next on the current stream wait for them.

    torch.distributed runs an operation that it waits for on the current stream, and the others on one of NCCL's: two of
    one communicator would run at once.
    """
    for work, _ in exchanges.values():
        work.wait()
