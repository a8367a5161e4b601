"""What block-sparse attention requires of its arguments."""

import math

import torch

from .. import checks
from ..checks import require
from ..layout import ALL_BLOCKS, block_count
from ..selection import Selection, are_selected


def check_types(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    selection: Selection,
) -> None:
    """What can be checked without reading a size; the fakes call it as well."""
    lut, count, query_block, key_block, scale, key_mask = selection
    checks.check_same_device(query=query, key=key, value=value, lut=lut, count=count, key_mask=key_mask)
    checks.check_float_4d(query=query, key=key, value=value)
    for name, tensor, rank, shape in (("lut", lut, 4, "(B, H, Mq, K)"), ("count", count, 3, "(B, H, Mq)")):
        require(tensor.dtype == torch.int32, f"{name} must be int32, got {tensor.dtype}")
        require(tensor.dim() == rank, f"{name} must have {rank} dimensions {shape}, got {tensor.dim()}")
    checks.check_key_mask_type(key_mask)
    checks.check_block("query_block", query_block)
    checks.check_block("key_block", key_block)
    require(math.isfinite(scale), f"scale must be finite, got {scale}")


def check_arguments(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    selection: Selection,
) -> None:
    """Every check that reads no values."""
    check_types(query, key, value, selection)
    lut, count, query_block, key_block, _, key_mask = selection
    batch, heads, tokens, head_dim = query.shape
    require(tokens > 0 and head_dim > 0, f"query {tuple(query.shape)} needs at least one token and one channel")
    require(key.shape == query.shape, f"key {tuple(key.shape)} must have the shape of query {tuple(query.shape)}")
    require(
        value.shape[:3] == query.shape[:3],
        f"value {tuple(value.shape)} must agree with query {tuple(query.shape)} in batch, heads and tokens",
    )
    query_blocks, key_blocks = block_count(tokens, query_block), block_count(tokens, key_block)
    rows = (batch, heads, query_blocks)
    require(
        lut.shape[:3] == rows and 1 <= lut.shape[3] <= key_blocks,
        f"lut {tuple(lut.shape)} must be ({batch}, {heads}, {query_blocks}, K) with 1 <= K <= {key_blocks}: {tokens} "
        f"tokens in query blocks of {query_block} and key blocks of {key_block}",
    )
    require(count.shape == rows, f"count {tuple(count.shape)} must be {rows}")
    checks.check_key_mask(key_mask, batch, tokens)


def check_contents(selection: Selection, tokens: int) -> None:
    """The contents of lut and count, on the CPU only: elsewhere reading them would sync."""
    lut, count, _, key_block, *_ = selection
    key_blocks = block_count(tokens, key_block)
    if not lut.is_cpu or are_selected(lut, count, key_blocks):
        return
    slots = lut.shape[-1]
    if count.numel() == 0:
        return
    low, high = (int(bound) for bound in count.aminmax())
    require(
        low >= ALL_BLOCKS and high <= slots,
        f"count has entries in [{low}, {high}], outside [{ALL_BLOCKS} (all blocks), {slots}]",
    )
    valid = torch.arange(slots) < count[..., None]
    low, high = (int(bound) for bound in torch.where(valid, lut, 0).aminmax())
    require(low >= 0 and high < key_blocks, f"lut has entries in [{low}, {high}], outside [0, {key_blocks})")
    ascending = (lut[..., 1:] > lut[..., :-1]) | ~valid[..., 1:]
    require(bool(ascending.all()), "lut must list each selected key block once, in ascending order")


def check_gradient(
    grad_out: torch.Tensor, query: torch.Tensor, value: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> None:
    """What the backward operator requires beyond the forward's arguments."""
    expected = (*query.shape[:3], value.shape[3])
    for name, tensor in (("grad_out", grad_out), ("out", out)):
        require(tensor.shape == expected, f"{name} must be {expected}, got {tuple(tensor.shape)}")
        require(tensor.dtype == query.dtype, f"{name} must be {query.dtype} like query, got {tensor.dtype}")
    expected_dtype = checks.accumulation_dtype(query.dtype)
    require(
        lse.shape == query.shape[:3] and lse.dtype == expected_dtype,
        f"lse must be {expected_dtype} {tuple(query.shape[:3])}, got {lse.dtype} {tuple(lse.shape)}",
    )
    checks.check_same_device(grad_out=grad_out, query=query, out=out, lse=lse)
