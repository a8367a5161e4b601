"""Launch settings of the kernels, chosen with the compiler's reports: no spills, and room for `programs` at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..capability import arch_of, padded_head_dim


@dataclass(frozen=True)
class Tiling:
    """Tokens per tile, warps per program, pipeline stages, and how many programs one multiprocessor holds."""

    tokens: int
    warps: int
    stages: int
    programs: int


# kernel -> by (bytes per element, width of the wider of the two head tiles, narrower ones as 64)
_TILINGS = {
    "state": {
        (2, 64): Tiling(64, 4, 4, 4),
        (2, 128): Tiling(32, 8, 4, 2),
    },
    "state_backward": {
        (2, 64): Tiling(64, 4, 3, 4),
        (2, 128): Tiling(64, 8, 2, 1),
    },
    "output": {
        (2, 64): Tiling(64, 4, 3, 4),
        (2, 128): Tiling(64, 8, 3, 2),
    },
    "output_backward": {
        (2, 64): Tiling(32, 4, 3, 2),
        (2, 128): Tiling(32, 8, 3, 1),
    },
}

# What differs where tensor cores read registers only, as on all architectures but 9.x and 10.x: more registers are
# taken, and some of these GPUs have less than half the shared memory.
_FROM_REGISTERS = {
    ("state", 2, 64): Tiling(32, 4, 2, 4),
    ("state", 2, 128): Tiling(32, 8, 3, 1),
    ("state_backward", 2, 128): Tiling(32, 8, 2, 1),
    ("output", 2, 128): Tiling(64, 8, 3, 1),
    ("output_backward", 2, 128): Tiling(16, 8, 3, 1),
}

# What differs on architecture 10.x: with four stages and warps the assembler spills, so that more programs fit.
_ON_BLACKWELL = {("state", 2, 64): Tiling(64, 8, 4, 2)}


def tiling(kernel: str, x: torch.Tensor, value: torch.Tensor) -> Tiling:
    """The settings of `kernel` for an input of this head_dim and dtype, and this value width."""
    width = max(64, padded_head_dim(x.shape[-1]), padded_head_dim(value.shape[-1]))
    wanted, architecture = (kernel, x.element_size(), width), arch_of(x.device)[0]
    settings = _TILINGS[kernel][wanted[1:]]
    if architecture == 10:
        return _ON_BLACKWELL.get(wanted, settings)
    return settings if architecture == 9 else _FROM_REGISTERS.get(wanted, settings)
