"""Tile sizes and launch settings of the Triton kernels: a few per GPU generation, of which the first is the default."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..capability import arch_of, padded_head_dim


@dataclass(frozen=True)
class Tiling:
    """Rows of the query tile and of the key tile of one program, warps, and depth of the software pipeline."""

    query: int
    key: int
    warps: int
    stages: int
    maxnreg: int | None = None

    def within(self, query_block: int, key_block: int) -> Tiling:
        """The same, with tiles that do not reach beyond a block."""
        query, key = min(self.query, query_block), min(self.key, key_block)
        return Tiling(query, key, self.warps, self.stages, self.maxnreg)


# kernel -> widest padded head_dim -> tilings, for 16-bit inputs
_HOPPER: dict[str, dict[int, tuple[Tiling, ...]]] = {
    "forward": {64: (Tiling(128, 64, 4, 3),), 128: (Tiling(128, 64, 8, 3),)},
    "query_gradient": {64: (Tiling(64, 64, 4, 2),), 128: (Tiling(64, 64, 4, 2),)},
    "key_gradient": {64: (Tiling(64, 64, 4, 2),), 128: (Tiling(64, 64, 4, 2),)},
}
_AMPERE = _HOPPER
_BLACKWELL = _HOPPER
# fp32 products run on the plain arithmetic units: small tiles, or the accumulators do not fit into registers
_FP32: dict[str, tuple[Tiling, ...]] = {
    "forward": (Tiling(32, 32, 4, 1),),
    "query_gradient": (Tiling(32, 32, 4, 1),),
    "key_gradient": (Tiling(32, 32, 4, 1),),
}


def tilings(
    kernel: str, device: torch.device, dtype: torch.dtype, widest: int, query_block: int, key_block: int
) -> list[Tiling]:
    """The tilings of `kernel` ("forward", "query_gradient", "key_gradient"), the default first.

    Args:
        device, dtype: of the tensors. widest: the larger of head_dim and value head_dim.
        query_block, key_block: tiles stay within blocks.
    """
    if dtype == torch.float32:
        found = _FP32[kernel]
    else:
        generation = {8: _AMPERE, 9: _HOPPER}.get(arch_of(device)[0], _BLACKWELL)
        found = generation[kernel][max(64, padded_head_dim(widest))]
    return list(dict.fromkeys(tiling.within(query_block, key_block) for tiling in found))
