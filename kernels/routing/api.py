"""`salad::pool_blocks` and `salad::select_blocks`: which key blocks every query block attends to."""

import torch
from torch.autograd.function import FunctionCtx

from .. import checks
from ..checks import accumulation_dtype, require
from ..layout import block_count
from . import cpu
from .density import check_density, kept_blocks


def check_pool_types(x: torch.Tensor, order: torch.Tensor | None, block: int) -> None:
    """What can be checked without reading a size; the fake calls it as well."""
    checks.check_same_device(x=x, order=order)
    checks.check_float_4d(x=x)
    checks.check_block("block", block)
    checks.check_order_type(order)


def check_pool(x: torch.Tensor, order: torch.Tensor | None, block: int) -> None:
    """Every check of `pool_blocks`."""
    check_pool_types(x, order, block)
    require(x.shape[2] > 0, "x has no tokens: S must be at least 1")
    checks.check_order(order, x.shape[2])


@torch.library.custom_op("salad::pool_blocks", mutates_args=())
def pool_blocks(x: torch.Tensor, order: torch.Tensor | None, block: int) -> torch.Tensor:
    """Mean of the valid rows of each block of tokens (method.md section 4.2, step 1; our choice).

    The result never requires grad, also where `x` does: selection carries no gradient (method.md section 4.2, step 6).

    Args:
        x: (B, H, S, D), any strides; fp32, bf16, fp16 or fp64.
        order: int32 (S,), a permutation; order[i] is the native index of the i-th token. None is the native order.
        block: tokens per block; blocks are consecutive runs in `order`, and only the last one is short.

    Returns:
        (B, H, ceil(S / block), D), contiguous, fp32 (fp64 for fp64).

    Raises:
        KernelArgumentError: on a wrong rank, dtype, device, block size or order.
    """
    check_pool(x, order, block)
    return cpu.pool_blocks(x, order, block)


@pool_blocks.register_fake
def _(x: torch.Tensor, order: torch.Tensor | None, block: int) -> torch.Tensor:
    check_pool_types(x, order, block)
    batch, heads, tokens, head_dim = x.shape
    return x.new_empty((batch, heads, block_count(tokens, block), head_dim), dtype=accumulation_dtype(x.dtype))


def check_select_types(
    pooled_query: torch.Tensor, pooled_key: torch.Tensor, query_block: int, key_block: int, density_permille: int
) -> None:
    """What can be checked without reading a size; the fake calls it as well."""
    checks.check_same_device(pooled_query=pooled_query, pooled_key=pooled_key)
    checks.check_float_4d(pooled_query=pooled_query, pooled_key=pooled_key)
    require(
        pooled_query.dtype in (torch.float32, torch.float64),
        f"pooled tensors must be float32 or float64 as pool_blocks returns them, got {pooled_query.dtype}",
    )
    check_density(query_block, key_block, density_permille)


def check_select(
    pooled_query: torch.Tensor, pooled_key: torch.Tensor, query_block: int, key_block: int, density_permille: int
) -> None:
    """Every check of `select_blocks`."""
    check_select_types(pooled_query, pooled_key, query_block, key_block, density_permille)
    (batch, heads, query_blocks, head_dim), (key_batch, key_heads, key_blocks, key_dim) = (
        pooled_query.shape,
        pooled_key.shape,
    )
    require(
        (batch, heads, head_dim) == (key_batch, key_heads, key_dim),
        f"pooled_query {tuple(pooled_query.shape)} and pooled_key {tuple(pooled_key.shape)} may differ only in blocks",
    )
    require(query_blocks > 0 and key_blocks > 0, "there must be at least one query block and one key block")
    # Both come from S tokens: each must be possible, or the forced blocks would lie outside.
    shortest, longest = (query_blocks - 1) * query_block + 1, query_blocks * query_block
    require(
        (key_blocks - 1) * key_block + 1 <= longest and key_blocks * key_block >= shortest,
        f"{query_blocks} query blocks of {query_block} and {key_blocks} key blocks of {key_block} tokens cannot cover "
        "the same sequence",
    )


@torch.library.custom_op("salad::select_blocks", mutates_args=())
def select_blocks(
    pooled_query: torch.Tensor, pooled_key: torch.Tensor, query_block: int, key_block: int, density_permille: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The key blocks with the best pooled scores, for every query block (method.md section 4.2; our choice).

    Key blocks that overlap the query block are always selected and count towards the number kept. Ties may resolve
    either way, but the same inputs give the same answer on every run. Not differentiable.

    Args:
        pooled_query: (B, H, Mq, D), fp32 or fp64, from `pool_blocks`.
        pooled_key: (B, H, Mk, D), same dtype.
        query_block, key_block: tokens per block; one divides the other.
        density_permille: 1000 * (1 - sparsity), in 0..1000; 1000 selects everything.

    Returns:
        lut: int32 (B, H, Mq, K), ids of the selected key blocks, ascending and unique, K = `kept_blocks(Mk, ...)`.
        count: int32 (B, H, Mq), how many entries of each row are valid; all K today. Consumers ignore the rest.

    Raises:
        KernelArgumentError: on wrong ranks, dtypes, devices, shapes, block sizes or density.
    """
    check_select(pooled_query, pooled_key, query_block, key_block, density_permille)
    return cpu.select_blocks(pooled_query, pooled_key, query_block, key_block, density_permille)


@select_blocks.register_fake
def _(
    pooled_query: torch.Tensor, pooled_key: torch.Tensor, query_block: int, key_block: int, density_permille: int
) -> tuple[torch.Tensor, torch.Tensor]:
    check_select_types(pooled_query, pooled_key, query_block, key_block, density_permille)
    batch, heads, query_blocks, _ = pooled_query.shape
    keep = kept_blocks(pooled_key.shape[2], query_block, key_block, density_permille)
    return (
        pooled_query.new_empty((batch, heads, query_blocks, keep), dtype=torch.int32),
        pooled_query.new_empty((batch, heads, query_blocks), dtype=torch.int32),
    )


def _no_gradient(ctx: FunctionCtx, inputs: tuple[object, ...], output: object) -> None:
    outputs = output if isinstance(output, tuple) else (output,)
    ctx.mark_non_differentiable(*outputs)


def _pool_backward(ctx: FunctionCtx, *grads: torch.Tensor) -> tuple[None, ...]:
    return (None,) * 3


def _select_backward(ctx: FunctionCtx, *grads: torch.Tensor) -> tuple[None, ...]:
    return (None,) * 5


pool_blocks.register_autograd(_pool_backward, setup_context=_no_gradient)
select_blocks.register_autograd(_select_backward, setup_context=_no_gradient)
