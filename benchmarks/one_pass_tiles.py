"""Sweep the settings of the two passes that serve routing and the linear branch, beside what else could serve them.

    python benchmarks/one_pass_tiles.py --output benchmarks/results/one_pass_tiles_h100.json

Both kernels of each pass are timed on the same bf16 inputs: that of the plain case, which reads them through
descriptors, and the general one, which takes orders, masks and rotated rows. A copy of one tensor is the yardstick.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import torch
from common import Results, Row, describe
from tiles import time_and_keep

from salad_compile.kernels import linear_output, linear_state, pool_blocks
from salad_compile.kernels.linear.tiles import Tiling
from salad_compile.kernels.one_pass import cuda, plain
from salad_compile.kernels.one_pass.tiles import PLAIN

KEY_BLOCK, QUERY_BLOCK, EPS = 64, 128, 1e-6
Settings = list[tuple[int, int, int, int]]  # tokens per tile, warps, stages, programs per multiprocessor
# head_dim -> settings of the kernels of the plain case
SWEEPS: dict[int, dict[str, Settings]] = {
    64: {
        "keys": [(64, 4, 4, 2), (64, 4, 4, 3), (64, 4, 3, 4), (64, 4, 5, 2), (64, 8, 4, 2)],
        "queries": [(64, 4, 3, 4), (64, 4, 2, 6), (64, 4, 4, 4), (64, 8, 3, 4)],
    },
    128: {
        "keys": [(64, 8, 4, 1), (64, 8, 4, 2), (64, 8, 3, 1), (64, 8, 5, 1), (64, 4, 3, 2)],
        "queries": [(64, 8, 3, 2), (64, 8, 4, 2), (128, 8, 3, 1), (64, 4, 3, 2), (64, 4, 2, 3)],
    },
}
# The same of the general kernels: what they fared best with on such inputs, and what they have by default.
GENERAL: dict[int, dict[str, Settings]] = {
    64: {"keys": [(64, 4, 4, 4)], "queries": [(64, 4, 3, 4)]},
    128: {"keys": [(64, 4, 3, 2), (64, 8, 4, 1)], "queries": [(64, 4, 2, 2), (64, 8, 4, 1)]},
}

Inputs = tuple[torch.Tensor, ...]
Call = Callable[[Inputs], object]


class Sweep:
    """Rows of one kind of input: two sets of query, key and value, a large part of which would fit into the cache.

    From call to call they take turns, whatever row a call belongs to: no row reads what the one before left there.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        shape = (options.batch, options.tokens, options.heads, options.head_dim)
        self.sets = [tuple(torch.randn(shape, device="cuda").bfloat16().transpose(1, 2) for _ in "qkv") for _ in "12"]
        self.calls = itertools.count()
        self.width: int = options.head_dim
        self.copy = torch.empty_like(self.sets[0][0])
        _, self.state, self.key_sum = self.keys(self.sets[0])

    def keys(self, x: Inputs) -> tuple[torch.Tensor, ...]:
        """The pass over keys and values."""
        return cuda.pool_and_summarise(x[1], x[2], None, KEY_BLOCK, "relu")

    def queries(self, x: Inputs) -> tuple[torch.Tensor, ...]:
        """The pass over queries."""
        return cuda.pool_and_read(x[0], self.state, self.key_sum, None, QUERY_BLOCK, "relu", EPS)

    def chain(self, x: Inputs) -> tuple[torch.Tensor, ...]:
        """One pass after the other."""
        _, *sums = self.keys(x)
        return cuda.pool_and_read(x[0], *sums, None, QUERY_BLOCK, "relu", EPS)

    def row(self, name: str, call: Call, **facts: object) -> Row:
        """One thing to time."""
        return Row({"row": name, "flops": 0.0} | facts, lambda _: lambda _: call(self.sets[next(self.calls) % 2]))

    def groups(self) -> list[list[Row]]:
        """The yardsticks, then every setting of either pass."""
        general = {name: Tiling(*settings[0]) for name, settings in GENERAL[self.width].items()}
        separate = [
            self.row("copy of one tensor", lambda x: self.copy.copy_(x[0])),
            self.row("pool query", lambda x: pool_blocks(x[0], None, QUERY_BLOCK)),
            self.row("pool key", lambda x: pool_blocks(x[1], None, KEY_BLOCK)),
            self.row("state", lambda x: linear_state(x[1], x[2], "relu")),
            self.row("output", lambda x: linear_output(x[0], self.state, self.key_sum, "relu", EPS)),
            self.row("both passes, plain", self.chain),
            self.row("both passes, general", generally(self.chain, general)),
        ]
        return [separate, self.settings("keys", self.keys), self.settings("queries", self.queries)]

    def settings(self, name: str, run: Call) -> list[Row]:
        """Rows of one pass: the kernel of the plain case, then the general one."""
        rows = []
        for tiling in (Tiling(*settings) for settings in SWEEPS[self.width][name]):
            rows.append(self.row(f"{name}, plain", plainly(run, {name: tiling}, self.width), tiling=asdict(tiling)))
        for tiling in (Tiling(*settings) for settings in GENERAL[self.width][name]):
            rows.append(self.row(f"{name}, general", generally(run, {name: tiling}), tiling=asdict(tiling)))
        return rows


def plainly(run: Call, tilings: dict[str, Tiling], width: int) -> Call:
    """`run` with these settings of the kernels of the plain case."""

    def patched(x: Inputs) -> object:
        with mock.patch.dict(PLAIN[width], tilings):
            return run(x)

    return patched


def generally(run: Call, tilings: dict[str, Tiling]) -> Call:
    """`run` by the general kernels, with these settings."""

    def patched(x: Inputs) -> object:
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(plain, "is_plain", return_value=False))
            stack.enter_context(mock.patch.object(cuda, "tiling", lambda kernel, *_, **__: tilings[kernel]))
            return run(x)

    return patched


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=32_760)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-dim", type=int, default=128, choices=SWEEPS)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/one_pass_tiles.json"))
    options = parser.parse_args()
    facts = {name: getattr(options, name) for name in ("batch", "tokens", "heads", "head_dim")}
    results = Results(options.output, describe(torch.device("cuda")) | facts)
    time_and_keep(Sweep(options).groups(), options.rounds, results)


if __name__ == "__main__":
    main()
