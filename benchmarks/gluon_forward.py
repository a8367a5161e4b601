"""Time the Gluon forward of block-sparse attention beside the Triton one, under load, and settings of it that lost.

    python benchmarks/gluon_forward.py                        # benchmarks/results/gluon_forward_h200.json
    python benchmarks/gluon_forward.py --variants             # other settings of the kernel as well

All rows of a shape are timed in turn, in an order that is drawn anew in every round: under its power limit a GPU
remembers what ran before. Ten products of 4096^3 run ahead of every timing, which hides the launch and keeps the GPU as
busy as a model does. Inputs have some structure; each block size has the lists that the product selects for it.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from common import Facts, Results, default_output, describe, select, spread
from torch import Tensor

from salad_compile.kernels.block_sparse import gluon, triton
from salad_compile.kernels.block_sparse.gluon_settings import settings_of
from salad_compile.kernels.repairs import repairs
from salad_compile.kernels.selection import Selection

KEY_BLOCK = 64
PERMILLE = 100
SHAPES = ("12x32768", "40x75520")
INPUTS = 3
WARM_UP = 3  # rounds that are not kept
# name -> query block, what differs from the default settings
VARIANTS: dict[int, dict[str, tuple[int, dict[str, Any]]]] = {
    128: {
        "3 stages, in place": (128, {"stages": 3, "query_slots": 1, "in_place": True}),
        "64, 2 stages, 2 queries": (64, {"stages": 2, "query_slots": 2, "in_place": False}),
    },
    64: {
        "4 stages": (128, {"stages": 4}),
        "64, 3 stages, in place": (64, {"stages": 3, "query_slots": 1, "in_place": True}),
        "64, steps of 1, 4 stages": (64, {"entries": 1, "stages": 4}),
    },
}

Call = Callable[[int], object]  # called with the number of the timing
Lists = dict[int, tuple[Tensor, Tensor]]


def make_inputs(heads: int, tokens: int, head_dim: int) -> list[tuple[tuple[Tensor, ...], Lists]]:
    """Three draws of query, key and value, (B, S, H, D) in memory, each with its lists for both query blocks."""
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    def structured() -> Tensor:
        runs = -(-tokens // 256)
        directions = draw(heads, 4, head_dim)
        extra = torch.einsum("brhk,hkd->brhd", draw(1, runs, heads, 4) * 0.5, directions)
        return draw(1, tokens, heads, head_dim) + extra.repeat_interleave(256, 1)[:, :tokens]

    inputs = []
    for _ in range(INPUTS):
        query, key, value = (x.transpose(1, 2) for x in (structured(), structured(), draw(1, tokens, heads, head_dim)))
        lists = {block: select(query, key, block, KEY_BLOCK, PERMILLE) for block in (64, 128)}
        inputs.append(((query, key, value), lists))
    return inputs


def attention(
    engine: Any, block: int, inputs: list[tuple[tuple[Tensor, ...], Lists]], key_mask: Tensor | None = None
) -> Call:
    """One engine's forward on the lists of a query block."""

    def run(number: int) -> object:
        qkv, lists = inputs[number % INPUTS]
        selection = Selection(*lists[block], block, KEY_BLOCK, qkv[0].shape[-1] ** -0.5, key_mask)
        return engine.block_sparse_attention(*qkv, selection)

    return run


def with_settings(block: int, changes: dict[str, Any], inputs: list[tuple[tuple[Tensor, ...], Lists]]) -> Call:
    """The Gluon forward with other settings."""

    def changed(*arguments: Any, **options: Any) -> object:
        return dataclasses.replace(settings_of(*arguments, **options), **changes)

    run = attention(gluon, block, inputs)

    def patched(number: int) -> object:
        with mock.patch.object(gluon, "settings_of", changed):
            return run(number)

    return patched


def time_in_turns(calls: dict[str, Call], rounds: int, ahead: int = 10) -> dict[str, list[float]]:
    """Milliseconds of every call, under load: behind so many products, which take 0.2 ms each and hide the host."""
    order, dice = list(calls), random.Random(0)
    load = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + WARM_UP):
        dice.shuffle(order)
        for name in order:
            for _ in range(ahead):
                load @ load
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            kept = calls[name](number)
            end.record()
            end.synchronize()
            del kept
            if number >= WARM_UP:
                times[name].append(start.elapsed_time(end))
    return times


def rows_of(heads: int, tokens: int, options: argparse.Namespace) -> list[Facts]:
    """The timed rows of one shape."""
    inputs = make_inputs(heads, tokens, options.head_dim)
    square = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    calls: dict[str, Call] = {"matmul 8192": lambda _: square @ square}
    flops = {"matmul 8192": 2.0 * 8192**3}
    work = {
        b: sum(int(x[1][b][1].sum()) for x in inputs) / INPUTS * b * KEY_BLOCK * 4 * options.head_dim for b in (64, 128)
    }
    mask = torch.ones(1, tokens, dtype=torch.bool, device="cuda")
    for (name, engine), block in itertools.product((("triton", triton), ("gluon", gluon)), (128, 64)):
        calls[f"{name} {block}x64"], flops[f"{name} {block}x64"] = attention(engine, block, inputs), work[block]
        masked = f"{name} {block}x64, masked"
        calls[masked], flops[masked] = attention(engine, block, inputs, mask), work[block]
    for name, (block, changes) in VARIANTS[options.head_dim].items() if options.variants else ():
        calls[f"gluon, {name}"], flops[f"gluon, {name}"] = with_settings(block, changes, inputs), work[block]
    calls = {name: call for name, call in calls.items() if options.only in name}
    rows = []
    for name, times in time_in_turns(calls, options.rounds).items():
        facts = {"row": name, "heads": heads, "tokens": tokens, "flops": flops[name]} | spread(times)
        median, kept = facts["median_ms"], [round(ms, 4) for ms in times]
        rows.append(facts | {"tflops": flops[name] / median / 1e9, "timings_ms": kept})
        print(f"{name:36s} H{heads} S{tokens} {median:8.4f} ms {rows[-1]['tflops']:6.1f} TFLOP/s", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--head-dim", type=int, default=128, choices=(64, 128))
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="heads x tokens, such as 12x32768")
    parser.add_argument("--variants", action="store_true", help="other settings of the kernel as well")
    parser.add_argument("--only", default="", metavar="TEXT", help="only rows whose name has this text")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    device = torch.device("cuda")
    facts = {"head_dim": options.head_dim, "permille": PERMILLE, "rounds": options.rounds, "dtype": "bfloat16"}
    results = Results(options.output or default_output("gluon_forward", device), describe(device) | facts)
    for shape in options.shapes:
        heads, tokens = map(int, shape.split("x"))
        results.add(rows_of(heads, tokens, options))
    print("tiles redone, calls that redid any, tiles:", *repairs().values())


if __name__ == "__main__":
    main()
