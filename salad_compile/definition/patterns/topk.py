"""Top-K: every query block keeps the key blocks with the best scores of block means (specification 4.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from salad_compile.definition.pattern import CallSize, Pattern, Selection
from salad_compile.definition.spec import AttentionSpec
from salad_compile.definition.tensors import BranchTensors
from salad_compile.definition.token_layout import Segments
from salad_compile.kernels import kept_blocks
from salad_compile.kernels.layout import block_count


class TopK(Pattern):
    """Key blocks by the score of their mean key against the query block's mean query, per head."""

    name = "topk"

    def select(
        self,
        query: Tensor,
        key: Tensor,
        where: Segments,
        spec: AttentionSpec,
        key_mask: Tensor | None,
        branch: BranchTensors,
    ) -> Selection:
        pooled_query = torch.ops.salad.pool_blocks.default(query.detach(), spec.query_block, key_mask)
        pooled_key = torch.ops.salad.pool_blocks.default(key.detach(), spec.key_block, key_mask)
        blocks, sinks = (spec.query_block, spec.key_block), (where.sink_begin, where.sink_end)
        selected = torch.ops.salad.select_blocks.default(
            pooled_query, pooled_key, *blocks, spec.permille, *sinks, key_mask, branch.get("permille")
        )
        return Selection(selected[0], selected[1])

    def selection_flops(self, size: CallSize, spec: AttentionSpec) -> int:
        scores = block_count(size.tokens, spec.query_block) * block_count(size.tokens, spec.key_block)
        return size.batch * 2 * (size.tokens + scores) * size.query_width

    def computed_pairs(self, size: CallSize, spec: AttentionSpec, permille: int) -> int:
        kept = int(kept_blocks(block_count(size.tokens, spec.key_block), spec.query_block, spec.key_block, permille))
        return size.tokens * min(size.tokens, kept * spec.key_block)


PATTERN = TopK()
