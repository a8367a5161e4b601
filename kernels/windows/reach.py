"""How far a sliding window reaches, and how many blocks it touches: integer formulas for ints and SymInts alike."""

import math

import torch

from ..routing.density import sink_blocks

_SCALE = 1_000_000


def reach_per_million(density_permille: int) -> int:
    """w / N in millionths: 1 - sqrt(sparsity), the density of a clipped window being 2 a - a^2 (specification 4.3).

    Args:
        density_permille: 1000 * (1 - sparsity), in 0..1000.
    """
    return _SCALE - math.isqrt((1000 - density_permille) * _SCALE * _SCALE // 1000)


def reach_in_tokens(tokens: int, density_permille: int, window: int = 0) -> int:
    """w: a key block belongs to a query block whose centre is at most so many tokens away (specification 4.3).

    Args:
        tokens: N, of the video; an int or a SymInt. window: w itself; 0 derives it from the density.
    """
    return window or tokens * reach_per_million(density_permille) // _SCALE


def doubled_reach(tokens: int, density_permille: int, window: int, query_block: int, key_block: int) -> int:
    """2 w, so that half tokens are whole numbers; at least what reaches every block that overlaps the query block."""
    reach: int = torch.sym_max(  # type: ignore[no-untyped-call]
        2 * reach_in_tokens(tokens, density_permille, window), query_block + key_block - 1
    )
    return reach


def doubled_reach_of(permille: torch.Tensor, tokens: int, query_block: int, key_block: int) -> torch.Tensor:
    """:func:`doubled_reach` of a density that is a tensor, on its device: the same integers."""
    square = (1000 - permille.to(torch.int64)) * (_SCALE * _SCALE // 1000)
    root = square.double().sqrt().to(torch.int64)
    root = root - (root * root > square).to(torch.int64)  # fp64 may round up to the next whole number
    return (2 * (tokens * (_SCALE - root) // _SCALE)).clamp(min=query_block + key_block - 1)


def list_width(key_blocks: int, doubled: int, key_block: int, sink_begin: int, sink_end: int) -> int:
    """K, the entries per row of the list: the widest window, and the sinks on top. Adds no guard on a SymInt."""
    sinks = sink_blocks(sink_begin, sink_end, key_block)
    width: int = torch.sym_min(key_blocks, doubled // key_block + 1 + sinks)  # type: ignore[no-untyped-call]
    return width
