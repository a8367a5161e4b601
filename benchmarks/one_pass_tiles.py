"""Sweep the settings of the two passes that serve routing and the linear branch, beside the separate operators.

python benchmarks/one_pass_tiles.py --output benchmarks/results/one_pass_tiles_h100.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import torch
from common import Results, Row, describe
from salad_compile.kernels import linear_output, linear_state, pool_blocks
from salad_compile.kernels.linear.tiles import Tiling
from salad_compile.kernels.one_pass import cuda
from tiles import Call, row, time_and_keep

KEYS = [(64, 4, 3, 2), (64, 8, 4, 1), (64, 8, 3, 2), (64, 4, 4, 1), (32, 4, 4, 2), (64, 4, 2, 4)]
QUERIES = [(64, 4, 2, 2), (64, 8, 4, 1), (64, 8, 3, 1), (64, 4, 3, 1), (32, 4, 4, 2), (32, 4, 3, 4), (128, 8, 2, 1)]


def with_tiling(tiling: Tiling, run: Callable[[], object]) -> Call:
    """`run` with one setting."""

    def patched() -> object:
        with mock.patch.object(cuda, "tiling", return_value=tiling):
            return run()

    return patched


def make_groups(tokens: int, heads: int) -> list[list[Row]]:
    """The separate operators, then both passes with every setting."""
    torch.manual_seed(0)
    shape = (1, tokens, heads, 128)
    query, key, value = (torch.randn(shape, device="cuda").bfloat16().transpose(1, 2) for _ in range(3))
    _, state, key_sum = cuda.pool_and_summarise(key, value, None, 64, "relu")
    separate = [
        row("pool query", 0.0, lambda: pool_blocks(query, None, 128)),
        row("pool key", 0.0, lambda: pool_blocks(key, None, 64)),
        row("state", 0.0, lambda: linear_state(key, value, "relu")),
        row("output", 0.0, lambda: linear_output(query, state, key_sum, "relu", 1e-6)),
    ]
    passes: dict[str, tuple[list[tuple[int, int, int, int]], Call]] = {
        "pool_and_summarise": (KEYS, lambda: cuda.pool_and_summarise(key, value, None, 64, "relu")),
        "pool_and_read": (QUERIES, lambda: cuda.pool_and_read(query, state, key_sum, None, 128, "relu", 1e-6)),
    }
    return [separate] + [
        [row(name, 0.0, with_tiling(t, run), tiling=asdict(t)) for t in (Tiling(*settings) for settings in tried)]
        for name, (tried, run) in passes.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32_760)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/one_pass_tiles.json"))
    options = parser.parse_args()
    facts = {"tokens": options.tokens, "heads": options.heads, "head_dim": 128}
    results = Results(options.output, describe(torch.device("cuda")) | facts)
    time_and_keep(make_groups(options.tokens, options.heads), options.rounds, results)


if __name__ == "__main__":
    main()
