"""Host side of the Triton engine of `select_by_mass`: allocations, grids, launches. Reads no tensor's values."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ..block_choice import BlockChoice
from ..capability import arch_of, padded_head_dim
from ..launch import launch
from ..layout import block_count, has_aligned_rows, mask_bytes, row_strides, with_dense_rows
from ..routing.triton import keep_best
from .triton_kernels import denominators_kernel, masses_kernel
from .triton_rows import NOTHING, SPREAD, SQUARED_MEAN, VARIANCE, rows_kernel

CELLS_AT_ONCE = 32  # of a program that makes rows
LOADS_AT_ONCE, FEWER_LOADS = 4, 2  # tokens of each of them; on Hopper, and on others, for the same reason as below
HOPPER = (9, 0)
# Rows and columns of a tile of scores. Products of fp32 run on the plain arithmetic units and take registers.
TILE, FP32_TILE = 64, 16
# Columns of a product that sums up masses, cells of query blocks; on Hopper, and on others, where they take registers.
COLUMNS, FEWER_COLUMNS = 128, 64
STAGES = 3


class Rows(NamedTuple):
    """Query or key as rows of products; see `rows_kernel`.

    Attributes:
        rows: (B, H, R, M, TILE_D), fp16, or fp32 of fp32.
        factor, log_held: fp32 (B, H, R, M).
        cells: rows of each block that are means of cells; R is one more where the last says what a mean hides.
    """

    rows: torch.Tensor
    factor: torch.Tensor
    log_held: torch.Tensor
    cells: int


def select_by_mass(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor | None, cell: int, scale: float, choice: BlockChoice
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `api.select_by_mass`. fp32 throughout, but that the means of 16-bit inputs are multiplied with 11 bits."""
    by_error, mask = value is not None, mask_bytes(choice.key_mask)
    of_query, of_key = (NOTHING, NOTHING) if value is None else (SQUARED_MEAN, VARIANCE)
    spread = None if value is None else _spread(value, cell, choice.key_block, mask)
    queries = make_rows(query, cell, choice.query_block, mask, of_query.value, scale * math.log2(math.e))
    keys = make_rows(key, cell, choice.key_block, mask, of_key.value, 1.0, spread)
    lse = _denominators(queries, keys)
    batch, heads = query.shape[:2]
    queries, keys = _by_head(queries), _by_head(keys)

    def fill(heads: slice, scores: torch.Tensor) -> None:
        """scores (heads, Mq, width)."""
        group, query_blocks, width = scores.shape
        key_blocks = keys.rows.shape[2]
        together, tile_q, tile_k = _masses_tile(queries)
        launch(
            masses_kernel,
            (block_count(key_blocks, tile_k), block_count(query_blocks, tile_q), group),
            scores.device,
            *(queries.rows[heads], queries.factor[heads]),
            *(keys.rows[heads], keys.factor[heads], keys.log_held[heads]),
            *(lse[heads], scores, query_blocks, key_blocks, width),
            QUERY_CELLS=queries.cells,
            KEY_CELLS=keys.cells,
            BY_ERROR=by_error,
            TILE_D=queries.rows.shape[-1],
            TILE_Q=tile_q,
            TILE_K=tile_k,
            TOGETHER=together,
            num_warps=4,
            num_stages=STAGES if tile_k == TILE else 1,
        )

    return keep_best(fill, query, (batch, heads, queries.rows.shape[2], keys.rows.shape[2]), choice)


def _by_head(rows: Rows) -> Rows:
    """With one axis for batch and heads."""
    return Rows(rows.rows.flatten(0, 1), rows.factor.flatten(0, 1), rows.log_held.flatten(0, 1), rows.cells)


def make_rows(
    x: torch.Tensor,
    cell: int,
    block: int,
    mask: torch.Tensor | None,
    extra: int,
    factor: float,
    spread: torch.Tensor | None = None,
) -> Rows:
    """The rows of a query or a key (B, H, S, D); `factor` is multiplied to what products give."""
    batch, heads, tokens, head_dim = x.shape
    cells = block // cell
    shape = (batch, heads, cells + (extra != NOTHING.value), block_count(tokens, block))
    narrow = torch.float32 if x.dtype == torch.float32 else torch.float16
    rows = x.new_empty((*shape, padded_head_dim(head_dim)), dtype=narrow)
    factors, log_held = (x.new_empty(shape, dtype=torch.float32) for _ in range(2))
    _launch_rows(x, mask, spread, (rows, factors, log_held), cell, cells, extra, factor)
    return Rows(rows, factors, log_held, cells)


def _spread(value: torch.Tensor, cell: int, block: int, mask: torch.Tensor | None) -> torch.Tensor:
    """fp32 (B, H, M): the variances of a block's values, summed over channels."""
    batch, heads, tokens, _ = value.shape
    spread = value.new_empty((batch, heads, block_count(tokens, block)), dtype=torch.float32)
    _launch_rows(value, mask, spread, (spread, spread, spread), cell, block // cell, SPREAD.value, 1.0)
    return spread


def _launch_rows(
    x: torch.Tensor,
    mask: torch.Tensor | None,
    spread: torch.Tensor | None,
    written: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    cell: int,
    cells: int,
    extra: int,
    factor: float,
) -> None:
    x = with_dense_rows(x)
    batch, heads, tokens, head_dim = x.shape
    blocks, at_once = block_count(tokens, cell * cells), max(1, CELLS_AT_ONCE // cells)
    loads = LOADS_AT_ONCE if arch_of(x.device) == HOPPER else FEWER_LOADS // (1 if has_aligned_rows(x) else 2)
    launch(
        rows_kernel,
        (batch * block_count(blocks, at_once) * heads,),
        x.device,
        *(x, mask, spread, *written, row_strides(x), heads, tokens, blocks, factor),
        HEAD_DIM=head_dim,
        TILE_D=padded_head_dim(head_dim),
        CELL=cell,
        CELLS=cells,
        BLOCKS=at_once,
        AT_ONCE=loads,
        EXTRA=extra,
        HAS_MASK=mask is not None,
        num_warps=4 if has_aligned_rows(x) and x.dtype != torch.float32 else 8,  # narrow loads take registers
    )


def _denominators(queries: Rows, keys: Rows) -> torch.Tensor:
    """fp32 (B * H, cells, Mq): see `denominators_kernel`."""
    batch, heads, _, query_blocks, width = queries.rows.shape
    query_rows, key_rows, tile = queries.cells * query_blocks, keys.cells * keys.rows.shape[3], _tile(queries)
    lse = queries.factor.new_empty((batch * heads, queries.cells, query_blocks))
    launch(
        denominators_kernel,
        (block_count(query_rows, tile), batch * heads),
        lse.device,
        *queries[:3],
        *keys[:3],
        *(lse, query_rows, key_rows, math.prod(queries.factor.shape[2:]), math.prod(keys.factor.shape[2:])),
        TILE_D=width,
        TILE_Q=tile,
        TILE_K=tile,
        num_warps=4,
        num_stages=STAGES,
    )
    return lse


def _tile(rows: Rows) -> int:
    return FP32_TILE if rows.rows.dtype == torch.float32 else TILE


def _masses_tile(queries: Rows) -> tuple[int, int, int]:
    """Cells of a query block that are multiplied at once, query blocks and key blocks of a tile. Products take 16."""
    if queries.rows.dtype == torch.float32:
        return 1, FP32_TILE, FP32_TILE
    # sums of few cells take more registers
    hopper = arch_of(queries.rows.device) == HOPPER
    columns = (
        (COLUMNS if queries.cells >= 4 else FEWER_COLUMNS) if hopper else FEWER_COLUMNS // (1 + (queries.cells == 1))
    )
    together = min(queries.cells, columns // 16)
    return together, columns // together, TILE
