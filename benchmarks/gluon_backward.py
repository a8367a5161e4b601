"""Time forward and backward of block-sparse attention in Gluon beside Triton, under load, and settings that lost.

    python benchmarks/gluon_backward.py                       # benchmarks/results/gluon_backward_h200.json
    python benchmarks/gluon_backward.py --variants            # other settings of the kernels as well

Inputs, load and order of the timings are those of `gluon_forward.py`. A second pass under the profiler says what each
kernel takes.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections import defaultdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from common import Facts, Results, default_output, describe, spread
from gluon_forward import INPUTS, KEY_BLOCK, PERMILLE, SHAPES, Call, Lists, make_inputs, time_in_turns
from torch import Tensor

from salad_compile.kernels.block_sparse import gluon, gluon_backward, triton
from salad_compile.kernels.block_sparse.gluon_settings import key_gradient_settings, query_gradient_settings
from salad_compile.kernels.selection import Selection

Inputs = list[tuple[tuple[Tensor, ...], Lists]]
# name -> query block, what differs in the kernel for queries, and in the one for keys
VARIANTS: dict[int, dict[str, tuple[int, dict[str, Any], dict[str, Any]]]] = {
    128: {
        "one step after the other": (128, {"ahead": False}, {}),
        "steps of 2": (128, {"ahead": False, "entries": 2, "stages": 2}, {}),
        "64, ahead": (64, {"ahead": True}, {}),
    },
    64: {"one step after the other": (128, {"ahead": False}, {})},
}


def training(engine: Any, backward: Any, block: int, inputs: Inputs) -> Call:
    """Forward of one engine and backward of one engine, on the lists of a query block."""
    grads = [torch.randn_like(qkv[2]) for qkv, _ in inputs]

    def run(number: int) -> object:
        qkv, lists = inputs[number % INPUTS]
        selection = Selection(*lists[block], block, KEY_BLOCK, qkv[0].shape[-1] ** -0.5)
        out, lse = engine.block_sparse_attention(*qkv, selection)
        return backward.block_sparse_attention_backward(grads[number % INPUTS], *qkv, out, lse, selection)

    return run


def with_settings(block: int, query: dict[str, Any], key: dict[str, Any], inputs: Inputs) -> Call:
    """Gluon with other settings of the backward."""

    def changed_query(*arguments: Any, **options: Any) -> object:
        return dataclasses.replace(query_gradient_settings(*arguments, **options), **query)

    def changed_key(*arguments: Any, **options: Any) -> object:
        return dataclasses.replace(key_gradient_settings(*arguments, **options), **key)

    run = training(gluon, gluon, block, inputs)

    def patched(number: int) -> object:
        with (
            mock.patch.object(gluon_backward, "query_gradient_settings", changed_query),
            mock.patch.object(gluon_backward, "key_gradient_settings", changed_key),
        ):
            return run(number)

    return patched


def kernels_of(call: Call, rounds: int = 6) -> dict[str, float]:
    """Milliseconds of each kernel in one call, under load."""
    load = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for number in range(rounds):
            for _ in range(10):
                load @ load
            call(number)
        torch.cuda.synchronize()
    times: dict[str, float] = defaultdict(float)
    for event in profile.key_averages():
        if event.key.endswith("_kernel"):  # Triton's; those of torch have arguments in their names
            times[event.key] += event.self_device_time_total / 1e3 / rounds
    return {name: round(ms, 4) for name, ms in sorted(times.items(), key=lambda item: -item[1])}


def rows_of(heads: int, tokens: int, options: argparse.Namespace) -> list[Facts]:
    """The timed rows of one shape."""
    inputs = make_inputs(heads, tokens, options.head_dim)
    square = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    calls: dict[str, Call] = {"matmul 8192": lambda _: square @ square}
    flops = {"matmul 8192": 2.0 * 8192**3}
    work = {
        b: sum(int(x[1][b][1].sum()) for x in inputs) / INPUTS * b * KEY_BLOCK * 14 * options.head_dim
        for b in (64, 128)
    }
    for block in (128, 64):
        for name, engine, backward in (
            ("triton", triton, triton),
            ("gluon", gluon, gluon),
        ):
            row = f"{name} {block}x64, forward + backward"
            calls[row], flops[row] = training(engine, backward, block, inputs), work[block]
    for name, (block, query, key) in VARIANTS[options.head_dim].items() if options.variants else ():
        calls[f"gluon, {name}"], flops[f"gluon, {name}"] = with_settings(block, query, key, inputs), work[block]
    calls = {name: call for name, call in calls.items() if options.only in name}
    rows = []
    for name, times in time_in_turns(calls, options.rounds).items():
        facts = {"row": name, "heads": heads, "tokens": tokens, "flops": flops[name]} | spread(times)
        median, kept = facts["median_ms"], [round(ms, 4) for ms in times]
        rows.append(facts | {"tflops": flops[name] / median / 1e9, "timings_ms": kept})
        print(f"{name:48s} H{heads} S{tokens} {median:8.4f} ms {rows[-1]['tflops']:6.1f} TFLOP/s", flush=True)
        if "matmul" not in name:
            rows[-1]["kernels_ms"] = kernels_of(calls[name])
            print("    ", rows[-1]["kernels_ms"], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--head-dim", type=int, default=128, choices=(64, 128))
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="heads x tokens, such as 12x32768")
    parser.add_argument("--variants", action="store_true", help="other settings of the kernels as well")
    parser.add_argument("--only", default="", metavar="TEXT", help="only rows whose name has this text")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    device = torch.device("cuda")
    facts = {"head_dim": options.head_dim, "permille": PERMILLE, "rounds": options.rounds, "dtype": "bfloat16"}
    results = Results(options.output or default_output("gluon_backward", device), describe(device) | facts)
    for shape in options.shapes:
        heads, tokens = map(int, shape.split("x"))
        results.add(rows_of(heads, tokens, options))


if __name__ == "__main__":
    main()
