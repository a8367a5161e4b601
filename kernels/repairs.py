"""How often the Gluon forward computed tiles of queries again, counted by the device itself. Imports no Triton."""

from __future__ import annotations

from typing import NamedTuple

import torch

_redone: dict[torch.device, torch.Tensor] = {}
_tiles: dict[torch.device, int] = {}


class Repairs(NamedTuple):
    """What one device has counted since the process began, as far as it has come.

    Attributes:
        redone: tiles whose scores grew too far beyond those of their first step, so that they were computed again.
        calls: calls in which there were any.
        tiles: tiles of all calls. A replay of a CUDA graph is no call.
    """

    redone: int
    calls: int
    tiles: int


def count_tiles(device: torch.device, tiles: int) -> torch.Tensor:
    """Note a call. Returns int64 (2,) that its kernels add to, tiles redone and calls.

    It is host memory that the device can write to, as in `deferred`: device memory would belong to a captured graph.
    """
    if device not in _redone:
        _redone[device] = torch.zeros(2, dtype=torch.int64, pin_memory=True)
    _tiles[device] = _tiles.get(device, 0) + tiles
    return _redone[device]


def repairs() -> dict[torch.device, Repairs]:
    """The counts of every CUDA device that ran the kernel. Nothing is waited for."""
    return {device: Repairs(int(n[0]), int(n[1]), _tiles[device]) for device, n in _redone.items()}
