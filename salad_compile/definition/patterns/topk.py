"""Top-K: every query block keeps the key blocks with the best scores of block means (specification 4.2)."""

from __future__ import annotations

import torch

from salad_compile.definition.pattern import BlockCall, CallSize, Pattern, SelectedBlocks
from salad_compile.definition.spec import AttentionSpec
from salad_compile.kernels import kept_blocks
from salad_compile.kernels.direct import call_operator
from salad_compile.kernels.layout import block_count
from salad_compile.kernels.routing.density import sink_blocks


class TopK(Pattern):
    """Key blocks by the score of their mean key against the query block's mean query, per head."""

    name = "topk"

    def select(self, call: BlockCall, spec: AttentionSpec) -> SelectedBlocks:
        pooled_query = call_operator(
            torch.ops.salad.pool_blocks.default, call.query.detach(), spec.query_block, call.key_mask
        )
        pooled_key = call_operator(
            torch.ops.salad.pool_blocks.default, call.key.detach(), spec.key_block, call.key_mask
        )
        blocks, sinks = (spec.query_block, spec.key_block), (call.where.sink_begin, call.where.sink_end)
        selected = call_operator(
            torch.ops.salad.select_blocks.default,
            pooled_query,
            pooled_key,
            *blocks,
            spec.permille,
            *sinks,
            call.key_mask,
            call.branch.get("permille"),
        )
        return SelectedBlocks(selected[0], selected[1], pooled_key)

    def selection_flops(self, size: CallSize, spec: AttentionSpec) -> int:
        scores = block_count(size.tokens, spec.query_block) * block_count(size.tokens, spec.key_block)
        return size.batch * 2 * (size.tokens + scores) * size.query_width

    def computed_pairs(self, size: CallSize, spec: AttentionSpec, permille: int) -> int:
        """Whole blocks. Every query sees the blocks that hold text, and blocks that do see all keys."""
        key_blocks = block_count(size.tokens, spec.key_block)
        kept = int(kept_blocks(key_blocks, spec.query_block, spec.key_block, permille))
        kept += int(sink_blocks(size.video_tokens, size.tokens, spec.key_block))
        text = size.tokens > size.video_tokens
        sparse = size.video_tokens // spec.query_block * spec.query_block if text else size.tokens
        return sparse * min(size.tokens, kept * spec.key_block) + (size.tokens - sparse) * size.tokens


PATTERN = TopK()
