"""What the Triton kernels can do: dtypes, head_dims, block sizes, GPUs. One table, and one check with its reasons."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch

from .checks import BLOCK_SIZES

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGEST_HEAD_DIM = 128
CELL_SIZES = (8, 16, 32)  # of selection by mass
# (major, minor) of the oldest GPU: asynchronous copies and bf16 matrix products came with Ampere.
OLDEST_ARCH = (8, 0)
# stands in where kernels are interpreted or recorded
NEWEST_TUNED_ARCH = (9, 0)
OTHERWISE = "salad_compile.kernels.use_engine('torch') runs plain torch operators instead, more slowly"


def next_power(number: int) -> int:
    """The next power of two."""
    return 1 << max(0, number - 1).bit_length()


def padded_head_dim(head_dim: int) -> int:
    """Width of the tile that holds one head: the next power of two, at least 16. The rest of it is masked."""
    return max(16, 1 << (head_dim - 1).bit_length())


def why_unsupported(
    device: torch.device,
    dtype: torch.dtype,
    head_dims: Iterable[int | None] = (),
    blocks: Iterable[int | None] = (),
) -> str | None:
    """Why the Triton kernels do not take this dtype, these head_dims and block sizes on this device; None if they do.

    The text names what was asked for, what there is, and the engine that takes the rest. None among the head_dims and
    blocks stands for what an operator does not have.
    """
    if dtype not in DTYPES:
        names = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
        return f"no Triton kernel for {dtype}; there are {names}. {OTHERWISE}"
    for head_dim in head_dims:
        if head_dim is not None and not 1 <= head_dim <= LARGEST_HEAD_DIM:
            return f"no Triton kernel for head_dim {head_dim}; any from 1 to {LARGEST_HEAD_DIM} will do. {OTHERWISE}"
    for block in blocks:
        if block is not None and block not in BLOCK_SIZES:
            sizes = ", ".join(map(str, BLOCK_SIZES))
            return f"no Triton kernel for blocks of {block} tokens; there are {sizes}. {OTHERWISE}"
    if device.type == "cuda" and arch_of(device) < OLDEST_ARCH:
        major, minor = arch_of(device)
        return (
            f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}; the Triton kernels need "
            f"{OLDEST_ARCH[0]}.{OLDEST_ARCH[1]} or newer. {OTHERWISE}"
        )
    return None


# A plain global and not a context variable, as in `engines.call`: the gate that sets it runs on one thread.
_targets: list[tuple[int, int]] = []


@contextmanager
def target_arch(arch: tuple[int, int]) -> Iterator[None]:
    """While active, `arch_of` returns `arch` for everything but CUDA: host code then prepares launches for that GPU."""
    _targets.append(arch)
    try:
        yield
    finally:
        _targets.pop()


def arch_of(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device; elsewhere the one of `target_arch`, or the newest tuned for."""
    if device.type == "cuda":
        return _cuda_arch(device)
    return _targets[-1] if _targets else NEWEST_TUNED_ARCH


@lru_cache(maxsize=64)
def _cuda_arch(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
