"""`salad::pool_blocks` and `salad::select_blocks`: which key blocks every query block attends to."""

from typing import Any

import torch

from ..autocast import without_autocast
from ..block_choice import BlockChoice
from ..checks import accumulation_dtype, check_permille
from ..differentiation import without_gradient
from ..direct import direct
from ..engines import Call, serve
from ..layout import block_count, empty_lists
from ..selection import remember_selected
from .checks import check_pool, check_pool_types, check_select, check_select_types
from .density import list_width


@torch.library.custom_op("salad::pool_blocks", mutates_args=())
@direct("salad::pool_blocks")
@without_autocast
def pool_blocks(x: torch.Tensor, block: int, key_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean of the valid rows of each block of tokens (specification 4.2, step 1; our choice).

    The result never requires grad, also where `x` does: selection carries no gradient (specification 4.2, step 6).

    Args:
        x: (B, H, S, D), any strides; fp32, bf16, fp16 or fp64.
        block: tokens per block; blocks are consecutive runs of tokens, and only the last one is short.
        key_mask: bool (B, S), True where a row is valid; None where all are.

    Returns:
        (B, H, ceil(S / block), D), contiguous, fp32 (fp64 for fp64); 0 for a block without a valid row.

    Raises:
        KernelArgumentError: on a wrong rank, dtype, device, block size or mask.
        UnsupportedKernelError: the engine has no kernel for this dtype, head_dim, block size or GPU.
    """
    engine, call = serve(_describe_pool, x, block, key_mask)
    pooled: torch.Tensor = engine.run(call, x, block, key_mask)
    return pooled


def _describe_pool(x: torch.Tensor, block: int, key_mask: torch.Tensor | None) -> Call:
    check_pool(x, block, key_mask)
    return Call("pool_blocks", x.device, x.dtype, head_dim=x.shape[-1], key_block=block, masked=key_mask is not None)


@pool_blocks.register_fake
def _(x: torch.Tensor, block: int, key_mask: torch.Tensor | None = None) -> torch.Tensor:
    check_pool_types(x, block, key_mask)
    batch, heads, tokens, head_dim = x.shape
    return x.new_empty((batch, heads, block_count(tokens, block), head_dim), dtype=accumulation_dtype(x.dtype))


@torch.library.custom_op("salad::select_blocks", mutates_args=())
@direct("salad::select_blocks")
@without_autocast
def select_blocks(
    pooled_query: torch.Tensor,
    pooled_key: torch.Tensor,
    query_block: int,
    key_block: int,
    density_permille: int,
    sink_begin: int = 0,
    sink_end: int = 0,
    key_mask: torch.Tensor | None = None,
    permille: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The key blocks with the best pooled scores, for every query block (specification 4.2; our choice).

    Key blocks that overlap the query block are always selected and count towards the number kept. Text tokens of a
    joint sequence are sinks (specification 4.4): key blocks that hold one are always selected, on top of the number
    kept, and query blocks that hold one attend to everything. Key blocks without a valid key are never selected. NaN
    ranks below every number. Ties may resolve either way, but the same inputs give the same answer on every run. Not
    differentiable.

    Args:
        pooled_query: (B, H, Mq, D), fp32 or fp64, from `pool_blocks`.
        pooled_key: (B, H, Mk, D), same dtype.
        query_block, key_block: tokens per block; one divides the other.
        density_permille: 1000 * (1 - sparsity), in 0..1000; 1000 selects everything.
        sink_begin, sink_end: tokens [sink_begin, sink_end) are text; none where they are equal.
        key_mask: bool (B, S), True where a key is valid; None where all are.
        permille: int32 (), the density where it may change from call to call; `density_permille` is then the most that
            it may say, and decides the width of the lists. None: `density_permille`.

    Returns:
        lut: int32 (B, H, Mq, K), ids of the selected key blocks, ascending and unique. K is `kept_blocks(Mk, ...)` plus
            the number of sinks, at most Mk.
        count: int32 (B, H, Mq), how many entries of each row are valid: K, fewer where `permille` says so or fewer key
            blocks are valid, or ALL_BLOCKS (-1) where the query block attends to everything. Consumers ignore the rest
            of the row.

    Raises:
        KernelArgumentError: on wrong ranks, dtypes, devices, shapes, block sizes, density, sinks or mask.
        UnsupportedKernelError: the engine has no kernel for this dtype or GPU.
    """
    choice = BlockChoice(query_block, key_block, density_permille, sink_begin, sink_end, key_mask, permille)
    engine, call = serve(_describe_select, pooled_query, pooled_key, *choice)
    check_permille(permille, density_permille)
    lut, count = engine.run(call, pooled_query, pooled_key, choice)
    if lut.is_cpu:
        full = key_mask is None and permille is None and sink_begin == sink_end  # nothing that shortens a list
        remember_selected(lut, count, pooled_key.shape[2], full=full)
    return lut, count


def _describe_select(pooled_query: torch.Tensor, pooled_key: torch.Tensor, *given: Any) -> Call:
    choice = BlockChoice(*given)
    check_select(pooled_query, pooled_key, choice)
    return Call("select_blocks", pooled_query.device, pooled_query.dtype, masked=choice.key_mask is not None)


@select_blocks.register_fake
def _(
    pooled_query: torch.Tensor, pooled_key: torch.Tensor, *given: Any, **named: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    choice = BlockChoice(*given, **named)
    check_select_types(pooled_query, pooled_key, choice)
    batch, heads, query_blocks, _ = pooled_query.shape
    slots = list_width(pooled_key.shape[2], *choice[:5])
    return empty_lists(pooled_query, batch, heads, query_blocks, slots)


without_gradient(pool_blocks)
without_gradient(select_blocks)
