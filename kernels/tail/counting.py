"""Counting what the lists of selected blocks leave out. A few operations of torch on small tensors, on any device."""

import torch

from ..block_sparse.reference import block_mask
from ..layout import block_count


def count_tail(
    lut: torch.Tensor,
    count: torch.Tensor,
    tokens: int,
    key_block: int,
    pool: int,
    begin: int,
    end: int,
    key_mask: torch.Tensor | None,
) -> torch.Tensor:
    """See `reference.tail_tokens`. Counted in units that lie within one block and within one pool."""
    unit = min(pool, key_block)
    units, pools = block_count(tokens, unit), block_count(tokens, pool)
    valid = torch.zeros(1 if key_mask is None else key_mask.shape[0], units * unit, device=lut.device)
    valid[:, begin:end] = 1 if key_mask is None else key_mask[:, begin:end].float()
    held = torch.unflatten(valid, 1, (units, unit)).sum(dim=2)[:, None, None]  # (1 or B, 1, 1, units)
    left = ~block_mask(lut, count, block_count(tokens, key_block))
    if unit < key_block:
        left = left.repeat_interleave(key_block // unit, dim=3)[..., :units]
    counted = left * held
    if unit < pool:
        padded = torch.nn.functional.pad(counted, (0, pools * (pool // unit) - units))
        counted = torch.unflatten(padded, 3, (pools, pool // unit)).sum(dim=4)
    return counted.contiguous()
