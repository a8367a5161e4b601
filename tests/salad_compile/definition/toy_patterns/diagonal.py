"""A third pattern, all of it in this file: each query block with the key blocks beside it, for sites without text.

The heads may look to one side: `diagonal_offsets` says by how many key blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from salad_compile.definition.pattern import BlockCall, CallSize, Pattern, SelectedBlocks
from salad_compile.definition.spec import AttentionSpec
from salad_compile.definition.tensors import TensorRow
from salad_compile.kernels.layout import block_count

OFFSETS = TensorRow("diagonal_offsets", shape=lambda site, spec: (site.heads,), dtype=torch.int32)


class Diagonal(Pattern):
    """As many neighbours to either side as the density says, and always the blocks that overlap."""

    name = "diagonal"
    takes_mask = False
    tensors = (OFFSETS,)

    def select(self, call: BlockCall, spec: AttentionSpec) -> SelectedBlocks:
        key_blocks = block_count(call.key.shape[2], spec.key_block)
        ids = torch.arange(key_blocks, dtype=torch.int32, device=call.query.device)
        rows = torch.arange(
            block_count(call.query.shape[2], spec.query_block), dtype=torch.int32, device=call.query.device
        )
        centres = (2 * rows + 1) * spec.query_block + 2 * spec.key_block * call.branch[OFFSETS.name][:, None]
        permille = call.branch["permille"] if spec.adjustable else spec.permille
        distance = ((2 * ids + 1) * spec.key_block - centres[..., None]).abs()
        beside = distance <= _reach(key_blocks, spec, permille)
        listed = (ids + key_blocks * beside.logical_not()).sort(dim=-1).values % key_blocks
        counts = beside.sum(dim=-1, dtype=torch.int32)
        batch = call.query.shape[0]
        return SelectedBlocks(
            listed.to(torch.int32).expand(batch, -1, -1, -1).contiguous(), counts.expand(batch, -1, -1).contiguous()
        )

    def computed_pairs(self, size: CallSize, spec: AttentionSpec, permille: int) -> int:
        key_blocks = block_count(size.tokens, spec.key_block)
        reach = int(_reach(key_blocks, spec, permille))
        pairs = 0
        for begin in range(0, size.tokens, spec.query_block):
            rows = min(spec.query_block, size.tokens - begin)
            for block in range(key_blocks):
                if abs((2 * block + 1) * spec.key_block - 2 * begin - spec.query_block) <= reach:
                    pairs += rows * min(spec.key_block, size.tokens - block * spec.key_block)
        return pairs


def _reach(key_blocks: int, spec: AttentionSpec, permille: int | Tensor) -> int | Tensor:
    """In half tokens, between the centres of two blocks."""
    return spec.query_block + spec.key_block - 1 + 2 * spec.key_block * (key_blocks * permille // 1000)


PATTERN = Diagonal()
