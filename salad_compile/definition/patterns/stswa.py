"""ST-SWA: each head attends within a sliding window, in space or through time (specification 4.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from salad_compile.definition.operands import Operands
from salad_compile.definition.pattern import BlockCall, CallSize, Pattern, SelectedBlocks, SiteFacts
from salad_compile.definition.spec import AttentionSpec
from salad_compile.definition.tensors import BranchSite, BranchTensors, TensorRow
from salad_compile.definition.token_layout import Arrangement, arrange_heads
from salad_compile.grid.orders import temporal_order
from salad_compile.kernels.direct import call_operator
from salad_compile.kernels.layout import block_count
from salad_compile.kernels.windows.reach import doubled_reach


def _odd_heads(tensor: Tensor, site: BranchSite) -> None:
    tensor.copy_(torch.arange(site.heads) % 2 == 1)


TEMPORAL_HEADS = TensorRow(
    "temporal_heads", shape=lambda site, spec: (site.heads,), initialise=_odd_heads, dtype=torch.bool, by_head=True
)
"""Which heads have their window through time; the odd ones at the start (specification 4.3)."""


class SlidingWindows(Pattern):
    """Key blocks near the query block, in the native order or, for `temporal_heads`, one place after another.

    The window is `window` tokens to either side, or as wide as the sparsity says.
    """

    name = "stswa"
    needs_grid = True
    takes_mask = False
    tensors = (TEMPORAL_HEADS,)
    head_choice = TEMPORAL_HEADS.name
    order = staticmethod(temporal_order)

    def arrange(self, given: Operands, spec: AttentionSpec) -> Arrangement:
        assert given.order is not None
        return arrange_heads(given.branch["temporal_heads"], given.order, given.side, given.tokens, given.video)

    def select(self, call: BlockCall, spec: AttentionSpec) -> SelectedBlocks:
        assert call.key_mask is None
        blocks = (spec.query_block, spec.key_block)
        selected = call_operator(
            torch.ops.salad.window_blocks.default,
            call.query,
            *blocks,
            spec.permille,
            spec.window,
            *call.where,
            call.branch.get("permille"),
        )
        return SelectedBlocks(selected[0], selected[1])

    def misfit(self, site: SiteFacts) -> str:
        if reason := super().misfit(site):
            return reason
        if site.window is not None and site.window >= site.video_tokens:
            return (
                f"window={site.window} reaches beyond the {site.video_tokens} video tokens of "
                f"{site.name or 'the model'!r}: choose a smaller one, or None, which follows the sparsity."
            )
        return ""

    def follows_sparsity(self, spec: AttentionSpec) -> bool:
        return not spec.window

    def head_labels(self, branch: BranchTensors) -> tuple[str, ...]:
        return tuple("through time" if temporal else "in space" for temporal in branch["temporal_heads"].tolist())

    def computed_pairs(self, size: CallSize, spec: AttentionSpec, permille: int) -> int:
        """Whole blocks whose centres lie within the window, clipped at the ends."""
        query_block, key_block, key_blocks = spec.query_block, spec.key_block, block_count(size.tokens, spec.key_block)
        reach = int(doubled_reach(size.video_tokens, permille, spec.window, query_block, key_block))
        pairs = 0
        for begin in range(0, size.tokens, query_block):
            # key block j lies within reach if |(2 j + 1) key_block - centre| <= reach, both in half tokens
            centre = 2 * begin + query_block
            first = max(0, -((reach + key_block - centre) // (2 * key_block)))
            last = min(key_blocks - 1, (centre + reach - key_block) // (2 * key_block))
            keys = min(size.tokens, (last + 1) * key_block) - first * key_block
            pairs += min(query_block, size.tokens - begin) * keys
        return pairs


PATTERN = SlidingWindows()
