"""Tile sizes and launch settings of the Triton kernels: a few per GPU generation, of which the first is the default."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..capability import arch_of, padded_head_dim


@dataclass(frozen=True)
class Tiling:
    """Rows of the query tile and of the key tile of one program, warps, and depth of the software pipeline."""

    query: int
    key: int
    warps: int
    stages: int
    descriptors: bool = False  # tiles are read through the bulk copy engine (Hopper and newer)

    def within(self, query_block: int, key_block: int) -> Tiling:
        """The same, with tiles that do not reach beyond a block."""
        return replace(self, query=min(self.query, query_block), key=min(self.key, key_block))


Table = dict[str, dict[int, tuple[Tiling, ...]]]  # kernel -> widest padded head_dim -> tilings

# Measured on an H100 (docs/kernels.md, benchmarks/results/tiles_h100_*.json). The forward wants many small programs at
# a time: the softmax of one hides behind the products of the others.
_HOPPER: Table = {
    "forward": {
        64: (Tiling(64, 64, 4, 2, True), Tiling(64, 64, 4, 1, True)),
        128: (Tiling(64, 64, 4, 1, True), Tiling(64, 64, 4, 2, True)),
    },
    "query_gradient": {
        64: (Tiling(64, 64, 4, 2, True), Tiling(64, 64, 4, 1, True)),
        128: (Tiling(64, 64, 4, 1, True), Tiling(64, 64, 4, 2, True)),
    },
    "key_gradient": {
        64: (Tiling(32, 64, 4, 2, True), Tiling(64, 64, 4, 2, True)),
        128: (Tiling(64, 64, 4, 2, True), Tiling(64, 64, 4, 1, True)),
    },
}
# The same where the inputs are not aligned, so that rows are read through pointers.
_HOPPER_GATHERED: Table = {
    "forward": {64: (Tiling(64, 64, 4, 2),), 128: (Tiling(64, 64, 4, 2),)},
    "query_gradient": {64: (Tiling(64, 64, 4, 2),), 128: (Tiling(64, 64, 4, 2),)},
    "key_gradient": {64: (Tiling(64, 64, 4, 2),), 128: (Tiling(32, 64, 4, 2),)},
}
# Never measured: chosen so that nothing spills and everything fits, also into the 99 KB of the consumer cards.
_AMPERE: Table = {
    "forward": {64: (Tiling(64, 64, 4, 2),), 128: (Tiling(64, 64, 8, 2),)},
    "query_gradient": {64: (Tiling(64, 64, 8, 2),), 128: (Tiling(64, 64, 8, 2),)},
    "key_gradient": {64: (Tiling(64, 64, 8, 2),), 128: (Tiling(32, 64, 8, 2),)},
}
_BLACKWELL: Table = {
    "forward": {64: (Tiling(128, 64, 4, 2, True),), 128: (Tiling(128, 64, 4, 2, True),)},
    "query_gradient": {64: (Tiling(64, 64, 8, 2, True),), 128: (Tiling(64, 64, 8, 2, True),)},
    "key_gradient": {64: (Tiling(64, 64, 4, 2, True),), 128: (Tiling(64, 64, 4, 2, True),)},
}
_BLACKWELL_GATHERED: Table = {
    "forward": {64: (Tiling(64, 64, 8, 2),), 128: (Tiling(64, 64, 8, 2),)},
    "query_gradient": {64: (Tiling(64, 64, 8, 2),), 128: (Tiling(64, 64, 8, 2),)},
    "key_gradient": {64: (Tiling(64, 64, 8, 2),), 128: (Tiling(64, 64, 4, 2),)},
}
# fp32 products run on the plain arithmetic units: small tiles, or the accumulators do not fit into registers.
_FP32: Table = {
    "forward": {64: (Tiling(32, 32, 8, 1),), 128: (Tiling(16, 16, 8, 1),)},
    "query_gradient": {64: (Tiling(32, 32, 8, 1),), 128: (Tiling(16, 16, 8, 1),)},
    "key_gradient": {64: (Tiling(32, 32, 8, 1),), 128: (Tiling(32, 32, 8, 1),)},
}
_GENERATIONS = {8: (_AMPERE, _AMPERE), 9: (_HOPPER, _HOPPER_GATHERED), 10: (_BLACKWELL, _BLACKWELL_GATHERED)}


def tilings(
    kernel: str,
    device: torch.device,
    dtype: torch.dtype,
    widest: int,
    query_block: int,
    key_block: int,
    *,
    described: bool,
) -> list[Tiling]:
    """The tilings of `kernel` ("forward", "query_gradient", "key_gradient"), the default first.

    Args:
        device, dtype: of the tensors. widest: the larger of head_dim and value head_dim.
        query_block, key_block: tiles stay within blocks.
        described: whether the bulk copy engine can read the tensors.
    """
    tables = (_FP32, _FP32) if dtype == torch.float32 else _GENERATIONS.get(arch_of(device)[0], (_AMPERE, _AMPERE))
    found = tables[0 if described else 1][kernel][max(64, padded_head_dim(widest))]
    return list(dict.fromkeys(tiling.within(query_block, key_block) for tiling in found))
