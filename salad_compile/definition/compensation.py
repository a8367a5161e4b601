"""What sparse attention leaves out, as pools of tokens in the same softmax (specification 4.6, our choice)."""

from __future__ import annotations

import torch
from torch import Tensor

from salad_compile.definition.pattern import BlockCall, SelectedBlocks
from salad_compile.definition.spec import AttentionSpec
from salad_compile.definition.tensors import BranchSite, TensorRow
from salad_compile.kernels.pools import Pools


def _start_weight(tensor: Tensor, site: BranchSite) -> None:
    tensor.fill_(-0.5)


TAIL_WEIGHT = TensorRow(
    "tail_weight",
    shape=lambda site, spec: (site.heads,),
    when=lambda spec: spec.compensation == "tail",
    initialise=_start_weight,
    by_head=True,
)
"""What is added to each head's scores with the pools, (H,); a mean of keys scores higher than its keys deserve."""


def tail_of(call: BlockCall, selected: SelectedBlocks, spec: AttentionSpec) -> Pools:
    """The pools of a call whose blocks are selected. Text and masked keys are in none of them."""
    tokens, where = call.key.shape[2], call.where
    video = (where.video_begin, where.video_end)
    lists = (selected.lut, selected.count, tokens, spec.key_block)
    weight = call.branch.get(TAIL_WEIGHT.name)
    means = torch.ops.salad.tail_means.default
    no_text = isinstance(where.sink_end, int) and where.sink_end == 0
    known = selected.key_means if no_text and spec.pool % spec.key_block == 0 else None
    return Pools(
        means(call.key, spec.pool, *video, call.key_mask, known, spec.key_block),
        means(call.value, spec.pool, *video, call.key_mask, None, 0),
        torch.ops.salad.tail_tokens.default(*lists, spec.pool, *video, call.key_mask),
        None if weight is None else weight.to(torch.float32),
    )
