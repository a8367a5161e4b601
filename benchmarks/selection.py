"""Selection alone: by block means, by mass and by error, the kernels of the last two by themselves, and other settings.

    python benchmarks/selection.py                    # into benchmarks/results/
    python benchmarks/selection.py --variants         # other settings of the kernels as well
    python benchmarks/selection.py --plain            # the plain torch operators as well, where they fit

All rows of a shape are timed in turn under load, see gluon_forward.py. `same` is the share of the entries of the lists
that plain torch chooses too, of two heads.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from common import Facts, Results, default_output, describe, free_memory, spread
from gluon_forward import INPUTS, PERMILLE, Call, make_inputs, time_in_turns
from torch import Tensor

from salad_compile.kernels import pool_blocks, select_blocks, select_by_mass, use_engine
from salad_compile.kernels.mass import triton as host
from salad_compile.kernels.mass.triton_rows import SQUARED_MEAN, VARIANCE

SHAPES = ("12x32760", "40x75600")  # heads x tokens: 1.3B at 480p, 14B at 720p
BLOCKS = ("128x64", "64x64", "16x16")
HEAD_DIM = 128
PATTERNS = {"mass16": (16, False), "error16": (16, True), "mass8": (8, False), "error8": (8, True)}
VARIANTS: dict[str, dict[str, int]] = {
    "64 columns": {"COLUMNS": 64},
    "2 stages": {"STAGES": 2},
    "4 stages": {"STAGES": 4},
    "8 loads": {"LOADS_AT_ONCE": 8},
    "2 loads": {"LOADS_AT_ONCE": 2},
    "16 cells": {"CELLS_AT_ONCE": 16},
    "64 cells": {"CELLS_AT_ONCE": 64},
}


def of_means(query: Tensor, key: Tensor, value: Tensor, blocks: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """As `topk` does."""
    return select_blocks(pool_blocks(query, blocks[0]), pool_blocks(key, blocks[1]), *blocks, PERMILLE)


def of_cells(pattern: str, query: Tensor, key: Tensor, value: Tensor, blocks: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """As the pattern does."""
    cell, by_error = PATTERNS[pattern]
    return select_by_mass(query, key, value if by_error else None, cell, HEAD_DIM**-0.5, *blocks, PERMILLE)


def calls_of(heads: int, tokens: int, blocks: tuple[int, int], options: argparse.Namespace) -> dict[str, Call]:
    """Row -> what is timed."""
    inputs = [qkv for qkv, _ in make_inputs(heads, tokens, HEAD_DIM)]
    calls: dict[str, Call] = {}

    def add(name: str, function: Callable[..., Any], *given: Any) -> None:
        calls[name] = lambda number: function(*given, *inputs[number % INPUTS], blocks)

    add("topk", of_means)
    for pattern in PATTERNS:
        add(pattern, of_cells, pattern)
        if options.plain:
            add(f"{pattern}, plain", plain, pattern)
        if options.variants:
            for name, changes in VARIANTS.items():
                add(f"{pattern}, {name}", varied, changes, pattern)
    for cell in (16, 8):
        add(f"rows of cells of {cell}", rows, cell)
        ready = rows(cell, *inputs[0], blocks)
        calls[f"denominators, cells of {cell}"] = lambda number, ready=ready: host._denominators(*ready)  # type: ignore[misc]
    return calls


def rows(cell: int, query: Tensor, key: Tensor, value: Tensor, blocks: tuple[int, int]) -> tuple[host.Rows, host.Rows]:
    """The three passes over query, key and value."""
    spread = host._spread(value, cell, blocks[1], None)
    of_query = host.make_rows(query, cell, blocks[0], None, SQUARED_MEAN.value, 1.0)
    return of_query, host.make_rows(key, cell, blocks[1], None, VARIANCE.value, 1.0, spread)


def plain(*given: Any) -> tuple[Tensor, Tensor]:
    """The plain torch operators."""
    with use_engine("torch"):
        return of_cells(*given)


def varied(changes: dict[str, int], *given: Any) -> tuple[Tensor, Tensor]:
    """With other settings of the kernels."""
    with mock.patch.multiple(host, **changes):
        return of_cells(*given)


def same_choice(heads: int, tokens: int, blocks: tuple[int, int]) -> dict[str, float]:
    """Pattern -> the share of entries that plain torch chooses too, of two heads."""
    inputs = [x[:, :2] for x in make_inputs(heads, tokens, HEAD_DIM)[0][0]]
    found = {}
    for pattern in PATTERNS:
        ours, theirs = of_cells(pattern, *inputs, blocks)[0], plain(pattern, *inputs, blocks)[0]
        slots = max(int(ours.max()), int(theirs.max())) + 1
        chosen = [torch.zeros(*x.shape[:3], slots, device=x.device).scatter_(-1, x.long(), 1) for x in (ours, theirs)]
        found[pattern] = float((chosen[0] * chosen[1]).sum() / chosen[1].sum())
    return found


def main() -> None:
    """Run the benchmark, print the rows, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="heads x tokens, such as 12x32760")
    parser.add_argument("--blocks", nargs="+", default=BLOCKS, help="tokens of a query block and of a key block")
    parser.add_argument("--variants", action="store_true", help="other settings of the kernels as well")
    parser.add_argument("--plain", action="store_true", help="plain torch operators as well")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    device = torch.device("cuda")
    facts = {"head_dim": HEAD_DIM, "permille": PERMILLE, "rounds": options.rounds, "dtype": "bfloat16"}
    results = Results(options.output or default_output("selection", device), describe(device) | facts)
    for shape, sizes in itertools.product(options.shapes, options.blocks):
        heads, tokens = map(int, shape.split("x"))
        query_block, key_block = map(int, sizes.split("x"))
        same = same_choice(heads, tokens, (query_block, key_block))
        rows: list[Facts] = []
        with torch.no_grad():
            timed = time_in_turns(calls_of(heads, tokens, (query_block, key_block), options), options.rounds)
        for name, times in timed.items():
            row: Facts = {"row": name, "blocks": sizes, "heads": heads, "tokens": tokens} | spread(times)
            if name in same:
                row["same"] = same[name]
            rows.append(row)
            print(f"{name:32s} {sizes} {shape} {row['median_ms']:8.4f} ms {row.get('same', '')}", flush=True)
        results.add(rows)
        free_memory()


if __name__ == "__main__":
    main()
