"""What sparse attention leaves out, as pools of tokens in the same softmax (specification 4.6, our choice)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from salad_compile.definition.pattern import BlockCall, SelectedBlocks
from salad_compile.definition.spec import AttentionSpec
from salad_compile.definition.tensors import BranchSite, TensorRow


def _start_weight(tensor: Tensor, site: BranchSite) -> None:
    tensor.fill_(-0.5)


TAIL_WEIGHT = TensorRow(
    "tail_weight",
    shape=lambda site, spec: (site.heads,),
    when=lambda spec: spec.compensation == "tail",
    initialise=_start_weight,
)
"""What is added to each head's scores with the pools, (H,); a mean of keys scores higher than its keys deserve."""


class Tail(NamedTuple):
    """The pools of one call, as `salad::attend_with_tail` takes them.

    Attributes:
        key, value: (B, H, P, head_dim), means over the valid tokens of the video.
        tokens: fp32 (B, H, query blocks, P), how many tokens of a pool each query block leaves out.
        log_weight: fp32 (H,), or None for 0.
    """

    key: Tensor
    value: Tensor
    tokens: Tensor
    log_weight: Tensor | None


def tail_of(call: BlockCall, selected: SelectedBlocks, spec: AttentionSpec) -> Tail:
    """The pools of a call whose blocks are selected. Text and masked keys are in none of them."""
    tokens, where = call.key.shape[2], call.where
    counted = torch.ops.salad.tail_tokens.default(
        selected.lut,
        selected.count,
        tokens,
        spec.key_block,
        spec.pool,
        where.video_begin,
        where.video_end,
        call.key_mask,
    )
    valid = _valid_rows(call)
    weight = call.branch.get(TAIL_WEIGHT.name)
    return Tail(
        _means(call.key, spec.pool, valid),
        _means(call.value, spec.pool, valid),
        counted,
        None if weight is None else weight.to(torch.float32),
    )


def _valid_rows(call: BlockCall) -> Tensor:
    """bool (1 or B, S), True for the tokens that pools are made of."""
    where, tokens = call.where, call.key.shape[2]
    rows = torch.ones((1, where.video_end - where.video_begin), dtype=torch.bool, device=call.key.device)
    rows = F.pad(rows, (where.video_begin, tokens - where.video_end))
    return rows if call.key_mask is None else rows & call.key_mask


def _means(x: Tensor, pool: int, valid: Tensor) -> Tensor:
    """(B, H, S, D) -> (B, H, P, D): means of the valid rows, 0 where a pool has none. Summed in fp32 or wider."""
    missing = -x.shape[2] % pool
    kept = x.masked_fill(valid.logical_not()[:, None, :, None], 0).to(torch.promote_types(x.dtype, torch.float32))
    sums = torch.unflatten(F.pad(kept, (0, 0, 0, missing)), 2, (-1, pool)).sum(3)
    counts = torch.unflatten(F.pad(valid, (0, missing)), 1, (-1, pool)).sum(2)
    means: Tensor = (sums / counts.clamp(min=1)[:, None, :, None]).to(x.dtype)
    return means
