"""Errors about the contents of index tensors on a GPU, without waiting for the GPU.

Reading a selection back would stall every layer. So a small kernel looks at it and leaves a mark in host memory, and
the next call of the operator that finds the mark raises: later than the mistake, as errors of CUDA are. The attention
kernels themselves never leave their tensors, whatever the lists say. With SALAD_CHECK_INDICES=1 each call waits and
raises itself.
"""

from __future__ import annotations

import os

import torch

from ..errors import KernelArgumentError
from ..launch import launch, recording
from .triton_checks import check_selection_kernel

_ROWS, _CHUNK = 16, 64  # tile sizes
_WRONG = (
    "count has entries outside [-1 (all blocks), K]",
    "lut has entries outside [0, key blocks), or not each block once in ascending order",
)
_flags: dict[torch.device, torch.Tensor] = {}


def check_selection(lut: torch.Tensor, count: torch.Tensor, key_blocks: int) -> None:
    """Look at the contents of lut (B, H, Mq, K) and count, both contiguous, on their device.

    Raises:
        KernelArgumentError: an earlier call on this device was given wrong contents; with SALAD_CHECK_INDICES=1, this.
    """
    device = lut.device
    flags = lut.new_empty(len(_WRONG)) if recording() else _flags_of(device)
    if not recording():
        raise_pending(device)
    rows, slots = count.numel(), lut.shape[-1]
    tiles = {"ROWS": _ROWS, "CHUNK": _CHUNK, "num_warps": 4}
    grid = (-(-rows // _ROWS),)
    launch(check_selection_kernel, grid, device, lut, count, flags, rows, slots, key_blocks, **tiles)
    if os.environ.get("SALAD_CHECK_INDICES") == "1" and not recording():
        raise_pending(device, wait=True)


def raise_pending(device: torch.device, *, wait: bool = False) -> None:
    """Raise what an earlier call left behind. wait: let the device finish first; otherwise only look.

    Raises:
        KernelArgumentError: naming the tensor and what is wrong with it.
    """
    if device not in _flags:
        return
    if wait and device.type == "cuda":
        torch.cuda.synchronize(device)
    found = _flags[device].tolist()
    if any(found):
        _flags[device].zero_()
        wrong = "; ".join(text for text, flag in zip(_WRONG, found, strict=True) if flag)
        raise KernelArgumentError(
            f"salad::block_sparse_attention on {device}: {wrong}. The call that got it read other blocks instead, and "
            "its result means nothing. SALAD_CHECK_INDICES=1 makes that call itself raise."
        )


def _flags_of(device: torch.device) -> torch.Tensor:
    """Host memory that the device can write to; ordinary memory where kernels are interpreted."""
    if device not in _flags:
        _flags[device] = torch.zeros(len(_WRONG), dtype=torch.int32, pin_memory=device.type == "cuda")
    return _flags[device]
