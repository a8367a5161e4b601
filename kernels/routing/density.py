"""How many key blocks a query block keeps: integer formulas for ints and SymInts alike."""

import torch

from ..checks import require
from ..layout import block_count


def check_density(query_block: int, key_block: int, density_permille: int) -> None:
    """Block sizes are positive and one divides the other; the density lies in 0..1000 permille."""
    require(query_block > 0, f"query_block must be at least 1 token, got {query_block}")
    require(key_block > 0, f"key_block must be at least 1 token, got {key_block}")
    require(
        query_block % key_block == 0 or key_block % query_block == 0,
        f"one of query_block={query_block} and key_block={key_block} must divide the other",
    )
    require(0 <= density_permille <= 1000, f"density_permille must lie in 0..1000, got {density_permille}")


def kept_blocks(key_blocks: int, query_block: int, key_block: int, density_permille: int) -> int:
    """Number of key blocks kept per query block (specification 4.2, step 4; our choice).

    min(Mk, max(forced, Mk * density_permille // 1000)), where forced = max(1, query_block // key_block) is the number
    of key blocks under one full query block. Integer arithmetic, because (1 - 0.9) * 10 is below 1 in floats.

    Args:
        key_blocks: Mk, the number of key blocks; an int or a SymInt (no guard is added).
        query_block: tokens per query block.
        key_block: tokens per key block.
        density_permille: 1000 * (1 - sparsity), in 0..1000.

    Raises:
        KernelArgumentError: if a block size is not positive, neither divides the other, or the density is out of range.
    """
    check_density(query_block, key_block, density_permille)
    forced = max(1, query_block // key_block)
    wanted: int = torch.sym_max(forced, key_blocks * density_permille // 1000)  # type: ignore[no-untyped-call]
    kept: int = torch.sym_min(key_blocks, wanted)  # type: ignore[no-untyped-call]
    return kept


def sink_blocks(sink_begin: int, sink_end: int, key_block: int) -> int:
    """How many key blocks hold text, without a branch on whether there is any. Adds no guard on a SymInt."""
    touched = block_count(sink_end, key_block) - sink_begin // key_block
    # an empty range may lie inside a block, and no range touches more blocks than it has tokens
    sinks: int = torch.sym_min(sink_end - sink_begin, touched)  # type: ignore[no-untyped-call]
    return sinks


def list_width(
    key_blocks: int, query_block: int, key_block: int, density_permille: int, sink_begin: int, sink_end: int
) -> int:
    """K, the entries per row of the list: what `kept_blocks` says, and the sinks on top. Adds no guard on a SymInt."""
    sinks = sink_blocks(sink_begin, sink_end, key_block)
    kept = kept_blocks(key_blocks, query_block, key_block, density_permille)
    width: int = torch.sym_min(key_blocks, kept + sinks)  # type: ignore[no-untyped-call]
    return width


def kept_now(permille: int, slots: int, key_blocks: int, query_block: int, key_block: int, sinks: int) -> int:
    """How many of the `slots` entries of a list a density fills; :func:`list_width` is its most."""
    forced = max(1, query_block // key_block)
    return min(slots, min(key_blocks, max(forced, key_blocks * permille // 1000)) + sinks)


def touched_blocks(begin: int, end: int, block: int) -> tuple[int, int]:
    """The blocks [first, end) that hold tokens of [begin, end)."""
    return (begin // block, block_count(end, block)) if begin < end else (0, 0)
