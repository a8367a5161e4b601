"""What compensation costs: sparse attention with selection, compiled, without pools and with means of 64 and 256.

    python benchmarks/tail.py                 # benchmarks/results/tail_h200.json

Forward, and forward with backward. All rows of a shape are timed in turn under load, see gluon_forward.py,
and behind enough of it that the host is ready with the last launch before the device begins.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from common import Facts, Results, default_output, describe, spread
from gluon_forward import INPUTS, PERMILLE, SHAPES, Call, make_inputs, time_in_turns
from torch import Tensor

from salad_compile.definition import patterns as known_patterns
from salad_compile.definition.attention import sparse_attention
from salad_compile.definition.spec import AttentionSpec
from salad_compile.definition.token_layout import segments

POOLS = (0, 64, 256)


def attention(pool: int, pattern: str, query_block: int, tokens: int, head_dim: int) -> object:
    """Sparse attention as the definition has it, compiled; pool 0 for none."""
    compensation = "tail" if pool else "none"
    spec = AttentionSpec(pattern, PERMILLE, query_block, 64, "relu", compensation=compensation, pool=pool)
    where = segments("none", tokens, tokens)
    known_patterns.find(spec.pattern)  # Dynamo does not trace imports

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return sparse_attention(query, key, value, where, spec, head_dim**-0.5)

    torch._dynamo.config.recompile_limit = 64  # one frame, compiled for every row
    return torch.compile(attend, fullgraph=True, dynamic=False)


def calls_of(tokens: int, heads: int, query_block: int, patterns: Sequence[str]) -> dict[str, Call]:
    """Row -> what is timed: every number of pools with the first pattern, the others with the last of these numbers."""
    inputs = make_inputs(heads, tokens, 128)
    grad = torch.randn_like(inputs[0][0][0])
    calls: dict[str, Call] = {}
    first, *others = patterns
    for pool, pattern in [*((pool, first) for pool in POOLS), *((POOLS[-1], other) for other in others)]:
        attend = attention(pool, pattern, query_block, tokens, 128)
        leaves = [[x.detach().requires_grad_() for x in qkv] for qkv, _ in inputs]

        def forward(number: int, attend: object = attend) -> object:
            with torch.no_grad():
                return attend(*inputs[number % INPUTS][0])  # type: ignore[operator]

        def both(number: int, attend: object = attend, leaves: list[list[Tensor]] = leaves) -> object:
            own = leaves[number % INPUTS]
            return torch.autograd.grad(attend(*own), own, grad)  # type: ignore[operator]

        name = (f"means of {pool}" if pool else "no compensation") + (f", {pattern}" if pattern != first else "")
        calls[f"forward, {name}"], calls[f"forward + backward, {name}"] = forward, both
    return calls


def main() -> None:
    """Run the benchmark, print the rows, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="heads x tokens, such as 12x32768")
    parser.add_argument("--query-blocks", nargs="+", type=int, default=[128, 64])
    parser.add_argument("--patterns", nargs="+", default=["topk"], help="the first one with and without compensation")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    device = torch.device("cuda")
    facts = {"head_dim": 128, "permille": PERMILLE, "rounds": options.rounds, "dtype": "bfloat16"}
    results = Results(options.output or default_output("tail", device), describe(device) | facts)
    for shape, block in itertools.product(options.shapes, options.query_blocks):
        heads, tokens = map(int, shape.split("x"))
        rows: list[Facts] = []
        for name, times in time_in_turns(
            calls_of(tokens, heads, block, options.patterns), options.rounds, ahead=40
        ).items():
            rows.append({"row": name, "query_block": block, "heads": heads, "tokens": tokens} | spread(times))
            base = next(row for row in rows if row["row"] == f"{name.split(',')[0]}, no compensation")
            rows[-1]["times_none"] = rows[-1]["median_ms"] / base["median_ms"]
            print(
                f"{name:36s} {block}x64 {shape} {rows[-1]['median_ms']:8.4f} ms {rows[-1]['times_none']:.3f}",
                flush=True,
            )
        results.add(rows)


if __name__ == "__main__":
    main()
