"""Sweep tile sizes of the block-sparse kernels: how the defaults in kernels/block_sparse/tiles.py were chosen.

    python benchmarks/tiles.py --output benchmarks/results/tiles_h100_d128.json

Every tiling of a kernel is timed in turn in every round, on the selection of random inputs, beside PyTorch's dense
attention and a large matrix product. A tiling that does not compile or does not fit is kept as a row with its error.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from common import Budget, Facts, Results, Row, clock_for, describe, select, take_turns, warm_up
from torch.nn.attention import SDPBackend, sdpa_kernel

from salad_compile.kernels.block_sparse import triton as host
from salad_compile.kernels.block_sparse.tiles import Tiling
from salad_compile.kernels.selection import Selection

SWEEPS: dict[str, list[Tiling]] = {
    "forward": [
        Tiling(64, 64, 4, 1, True),
        Tiling(64, 64, 4, 2, True),
        Tiling(128, 64, 4, 1, True),
        Tiling(128, 64, 4, 2, True),
        Tiling(128, 64, 8, 2, True),
        Tiling(64, 64, 4, 1),
        Tiling(64, 64, 4, 2),
        Tiling(128, 64, 8, 2),
    ],
    "query_gradient": [
        Tiling(64, 64, 4, 1, True),
        Tiling(64, 64, 4, 2, True),
        Tiling(64, 64, 4, 2),
        Tiling(128, 64, 8, 1, True),
        Tiling(128, 64, 8, 2, True),
    ],
    "key_gradient": [
        Tiling(64, 64, 4, 1, True),
        Tiling(64, 64, 4, 2, True),
        Tiling(64, 64, 4, 2),
        Tiling(32, 64, 4, 2, True),
        Tiling(32, 64, 4, 1, True),
    ],
}
EXECUTED = {"forward": 2, "query_gradient": 3, "key_gradient": 4}  # matrix products per selected pair


Call = Callable[[], object]


def only(kernel: str, tiling: Tiling, run: Call, index: object) -> Call:
    """`run` with one tiling for one kernel; without the backward's other kernel and the inversion."""
    launch: Any = host.launch

    def launched(launched_kernel: Any, *arguments: Any, **options: Any) -> None:
        if kernel in launched_kernel.__name__:
            launch(launched_kernel, *arguments, **options)

    def patched() -> object:
        with (
            mock.patch.object(host, "_candidates", return_value=([tiling], (str(tiling),))),
            mock.patch.object(host, "launch", launched),
            mock.patch.object(host, "invert", return_value=index),
            mock.patch.object(host, "check_selection"),
        ):
            return run()

    return patched


def dense(backend: SDPBackend, tensors: tuple[torch.Tensor, ...]) -> Call:
    """PyTorch's attention limited to one kernel."""

    def run() -> object:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*tensors)

    return run


def row(name: str, flops: float, call: Call, **facts: object) -> Row:
    """One row."""
    return Row({"row": name, "flops": flops} | facts, lambda _: lambda _: call())


def make_rows(options: argparse.Namespace) -> tuple[Facts, list[list[Row]]]:
    """Facts of all rows, and the rows: the yardsticks, then each kernel's tilings."""
    torch.manual_seed(0)
    shape = (1, options.tokens, options.heads, options.head_dim)
    query, key, value, grad = (torch.randn(shape, device="cuda").bfloat16().transpose(1, 2) for _ in range(4))
    blocks = (options.query_block, 64)
    lut, count = select(query, key, *blocks, options.permille)
    selection = Selection(lut, count, *blocks, options.head_dim**-0.5)
    out, lse = host.block_sparse_attention(query, key, value, selection)
    key_blocks = -(-options.tokens // blocks[1])
    index = host.invert(lut, count, key_blocks)
    square = torch.randn(8192, 8192, device="cuda").bfloat16()
    dense_flops = 4.0 * options.heads * options.tokens**2 * options.head_dim
    groups = [
        [
            row("matmul 8192", 2.0 * 8192**3, lambda: square @ square),
            row("dense cudnn", dense_flops, dense(SDPBackend.CUDNN_ATTENTION, (query, key, value))),
            row("dense flash", dense_flops, dense(SDPBackend.FLASH_ATTENTION, (query, key, value))),
            row("invert", 0.0, lambda: host.invert(lut, count, key_blocks).rows),
        ]
    ]
    calls: dict[str, Call] = dict.fromkeys(
        SWEEPS, lambda: host.block_sparse_attention_backward(grad, query, key, value, out, lse, selection)[0:0]
    )
    calls["forward"] = lambda: host.block_sparse_attention(query, key, value, selection)
    product = 2.0 * options.heads * options.tokens * lut.shape[-1] * 64 * options.head_dim
    for kernel in options.kernels:
        runs = ((tiling, only(kernel, tiling, calls[kernel], index)) for tiling in SWEEPS[kernel])
        groups.append([row(kernel, EXECUTED[kernel] * product, run, tiling=asdict(tiling)) for tiling, run in runs])
    names = ("tokens", "heads", "head_dim", "permille", "rounds")
    return {name: getattr(options, name) for name in names} | {"blocks": blocks, "kept": lut.shape[-1]}, groups


def time_and_keep(groups: list[list[Row]], rounds: int, results: Results) -> None:
    """Time the rows of each group in turn, print them, and write them."""
    clock, budget = clock_for(torch.device("cuda")), Budget(None)
    for rows in groups:
        for one in rows:
            warm_up(one, clock, budget)
        take_turns(rows, clock, rounds, row_seconds=5.0)
        done = [one.to_json() for one in rows]
        for facts in done:
            if median := facts.get("median_ms"):
                facts["executed_tflops"] = facts["flops"] / median / 1e9
            print(
                *(facts.get(name, "") for name in ("row", "tiling", "median_ms", "executed_tflops", "error")),
                flush=True,
            )
        results.add(done)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32_760)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--query-block", type=int, default=128)
    parser.add_argument("--permille", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--kernels", nargs="*", default=list(SWEEPS))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/tiles.json"))
    options = parser.parse_args()
    facts, groups = make_rows(options)
    results = Results(options.output, describe(torch.device("cuda")) | facts)
    time_and_keep(groups, options.rounds, results)


if __name__ == "__main__":
    main()
