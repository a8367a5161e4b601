"""Cost over length at a fixed number of kept key blocks: nanoseconds of a token, 8,000 to 128,000 tokens.

    python benchmarks/length.py                            on a GPU, about 30 seconds
    python benchmarks/length.py --quick --device cpu       small sizes, two rounds: checks that it runs

A query block attends the same number of key blocks whatever the length, so a kernel without a length of its own takes
every token the same time. All lengths are timed in turn.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch
from attention import FORWARD, KEY_BLOCK, REST_S, Case, Comparison, Inputs
from common import LOADED, Budget, Facts, Results, clock_for, default_output, describe, take_both_turns, warm_up

KEPT = 32  # key blocks: 2,048 keys
# in key blocks: so that the density is a whole number of thousandths, and exactly as many blocks are kept
LENGTHS = (125, 250, 500, 1000, 2000)


def cases(heads: int, quick: bool) -> list[Case]:
    """One for each length."""
    lengths = [blocks * KEY_BLOCK for blocks in (LENGTHS[:2] if quick else LENGTHS)]
    found = [Case(f"length-{tokens}", tokens, heads=heads, rows="length") for tokens in lengths]
    return [dataclasses.replace(case, heads=2, head_dim=32) for case in found] if quick else found


def finish(rows: list[Facts]) -> list[Facts]:
    """With nanoseconds of a token, and those over the fewest of the same row."""
    timed = [row for row in rows if "median_ms" in row and not row["error"]]
    for row in timed:
        row["ns_per_token"] = 1e6 * row["median_ms"] / row["tokens"]
    for row in timed:
        row["over_least"] = row["ns_per_token"] / min(r["ns_per_token"] for r in timed if r["row"] == row["row"])
    return rows


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--rounds", type=int, help="timings of a row (default: 50; 2 with --quick)")
    parser.add_argument("--budget-seconds", type=float, default=60, help="then no new row starts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--quick", action="store_true", help="small sizes, two rounds")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    facts = describe(device) | {"seed": options.seed, "kept_blocks": KEPT, "load": LOADED}
    results = Results(options.output or default_output("length", device), facts)
    clock, budget, rows = clock_for(device), Budget(options.budget_seconds), []
    for case in cases(options.heads, options.quick):
        comparison = Comparison(case, Inputs(case, device, options.seed), compiled=device.type == "cuda")
        sparsity = 1 - KEPT * KEY_BLOCK / case.tokens
        rows += [comparison.sparse(FORWARD, sparsity), comparison.operator(FORWARD, sparsity)]
    for row in rows:
        warm_up(row, clock, budget)
    rounds = options.rounds or (2 if options.quick else 50)
    write = lambda: results.write_sometimes(lambda: finish([row.to_json() for row in rows]))  # noqa: E731
    take_both_turns(rows, clock, rounds, 2.0, write, rest_s=REST_S)
    finished = finish([row.to_json() for row in rows])
    results.add(finished)
    for row in sorted(finished, key=lambda row: row["row"]):
        said = (
            row["error"] or f"{row['median_ms']:9.3f} ms {row['ns_per_token']:7.2f} ns a token {row['over_least']:.3f}x"
        )
        print(f"{row['row']:24}{row['tokens']:>8} tokens  {said}")


if __name__ == "__main__":
    main()
