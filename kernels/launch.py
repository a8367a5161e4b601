"""The one place where Triton kernels are launched, or recorded instead so that they can be compiled without a GPU."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .listening import listen


@dataclass(frozen=True)
class Launch:
    """One recorded launch: what `kernels.inspect` compiles ahead of time."""

    kernel: Any
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, int]


_recorders: list[list[Launch]] = []


@contextlib.contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Collect launches instead of running them. The operators' host code then also runs on meta tensors."""
    with listen(_recorders, []) as recorded:
        yield recorded


def recording() -> bool:
    """Whether launches are collected instead of run."""
    return bool(_recorders)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    device: torch.device,
    *arguments: Any,
    num_warps: int,
    num_stages: int = 1,
    maxnreg: int | None = None,
    **constants: Any,
) -> None:
    """Run `kernel` over `grid` on the device of its tensors.

    Args:
        kernel: a `@triton.jit` function.
        grid: programs in x, y, z; an empty grid launches nothing.
        arguments: the run-time arguments, in order; None where the kernel has an optional pointer.
        num_warps, num_stages, maxnreg: Triton's launch options.
        constants: the `tl.constexpr` arguments, by name.
    """
    options = {"num_warps": num_warps, "num_stages": num_stages} | ({} if maxnreg is None else {"maxnreg": maxnreg})
    if _recorders:
        _recorders[-1].append(Launch(kernel, arguments, constants, options))
    elif 0 not in grid:
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            kernel[grid](*arguments, **constants, **options)


def interpreting() -> bool:
    """Whether Triton interprets kernels on the CPU, as tests do on machines without a GPU."""
    wanted = os.environ.get("TRITON_INTERPRET")
    return wanted is not None and wanted.lower() in ("1", "true", "on", "yes")
