"""mass8: every query block keeps the key blocks with most of its softmax, as means of eight tokens see it (our choice).

Means of a whole block hide what is sharp in it. Beside compensation that is what has to be found: what is flat, pools
stand for.
"""

from __future__ import annotations

import torch

from salad_compile.definition.pattern import BlockCall, CallSize, SelectedBlocks
from salad_compile.definition.patterns.topk import TopK
from salad_compile.definition.spec import AttentionSpec
from salad_compile.kernels.direct import call_operator
from salad_compile.kernels.layout import block_count


class CellMass(TopK):
    """Key blocks by the mass of their cells in the softmax of the query block's cells, per head.

    Args:
        name: see :class:`Pattern`. cell: tokens for which one mean stands; it divides every block.
        by_error: whether the mass counts times the spread that a mean of the block would hide.
    """

    def __init__(self, name: str, cell: int, *, by_error: bool = False) -> None:
        self.name, self.cell, self.by_error = name, cell, by_error  # type: ignore[misc]  # of each instance

    def select(self, call: BlockCall, spec: AttentionSpec) -> SelectedBlocks:
        selected = call_operator(
            torch.ops.salad.select_by_mass.default,
            call.query.detach(),
            call.key.detach(),
            call.value.detach() if self.by_error else None,
            self.cell,
            call.scale,
            *(spec.query_block, spec.key_block, spec.permille),
            *(call.where.sink_begin, call.where.sink_end),
            call.key_mask,
            call.branch.get("permille"),
        )
        return SelectedBlocks(selected[0], selected[1])

    def selection_flops(self, size: CallSize, spec: AttentionSpec) -> int:
        return size.batch * 2 * (size.tokens + block_count(size.tokens, self.cell) ** 2) * size.query_width


PATTERN = CellMass("mass8", 8)
