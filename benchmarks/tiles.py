"""Sweep tile sizes of the block-sparse kernels: how the defaults in kernels/block_sparse/tiles.py were chosen.

    python benchmarks/tiles.py --output benchmarks/results/tiles_h100.json

Every tiling of a kernel is timed in turn in every round, on the selection of random inputs, beside PyTorch's dense
attention and a large matrix product. A tiling that does not compile or does not fit is kept as a row with its error.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
import triton
from salad_compile.kernels import pool_blocks, select_blocks, use_engine
from salad_compile.kernels.block_sparse import cuda
from salad_compile.kernels.block_sparse.tiles import Tiling
from torch.nn.attention import SDPBackend, sdpa_kernel

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


def milliseconds(run: Callable[[], object]) -> float:
    """Device time of one call. The device first waits a little, so that the host's share of a launch is not timed."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(4_000_000)  # cycles, about 2 ms; private, seen in torch 2.11 and 2.13
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def rounds_of(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, object]]:
    """Median and spread of each run, timed in turn; an error instead where a run fails."""
    times: dict[str, list[float]] = {}
    failed: dict[str, dict[str, object]] = {}
    for name, run in runs.items():
        try:
            run()
            torch.cuda.synchronize()
            times[name] = []
        except Exception as error:
            failed[name] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    for _ in range(rounds):
        for name in times:
            times[name].append(milliseconds(runs[name]))
    done = {}
    for name, values in times.items():
        ordered = sorted(values)
        spread = {"p10_ms": ordered[len(ordered) // 10], "p90_ms": ordered[-1 - len(ordered) // 10]}
        done[name] = {"median_ms": statistics.median(values), **spread}
    return done | failed


def only(kernel: str, tiling: Tiling, run: Callable[[], object], index: object) -> Callable[[], object]:
    """`run` with one tiling for one kernel; the backward's other kernel and the inversion are left out."""

    def launched(launched_kernel: object, *arguments: object, **options: object) -> None:
        if kernel in launched_kernel.__name__:  # type: ignore[attr-defined]
            _launch(launched_kernel, *arguments, **options)  # type: ignore[arg-type]

    _launch = cuda.launch

    def patched() -> object:
        with (
            mock.patch.object(cuda, "tilings", return_value=[tiling]),
            mock.patch.object(cuda, "launch", launched),
            mock.patch.object(cuda, "invert", return_value=index),
        ):
            return run()

    return patched


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
    torch.manual_seed(0)
    shape = (1, options.tokens, options.heads, options.head_dim)
    query, key, value, grad = (torch.randn(shape, device="cuda").bfloat16().transpose(1, 2) for _ in range(4))
    blocks = (options.query_block, 64)
    with use_engine("torch"):
        pooled = pool_blocks(query, None, blocks[0]), pool_blocks(key, None, blocks[1])
        lut, count = select_blocks(*pooled, *blocks, options.permille)
    arguments = (lut, count, None, *blocks, options.head_dim**-0.5)
    out, lse = cuda.forward(query, key, value, *arguments)
    index = cuda.invert(lut, count, -(-options.tokens // blocks[1]))
    pairs = options.heads * options.tokens * lut.shape[-1] * 64
    common = {
        "command": " ".join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "tokens": options.tokens,
        "heads": options.heads,
        "head_dim": options.head_dim,
        "blocks": blocks,
        "kept": lut.shape[-1],
        "rounds": options.rounds,
    }
    rows: list[dict[str, object]] = []

    def dense(backend: SDPBackend) -> Callable[[], object]:
        def run() -> object:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(query, key, value)

        return run

    square = torch.randn(8192, 8192, device="cuda").bfloat16()
    baselines = {
        "matmul 8192": lambda: square @ square,
        "dense cudnn": dense(SDPBackend.CUDNN_ATTENTION),
        "dense flash": dense(SDPBackend.FLASH_ATTENTION),
        "invert": lambda: cuda.invert(lut, count, -(-options.tokens // blocks[1])),
    }
    work = {"matmul 8192": 2 * 8192**3, "invert": 0}
    for name, row in rounds_of(baselines, options.rounds).items():
        flops = work.get(name, 4 * options.heads * options.tokens**2 * options.head_dim)
        rows.append(
            common | {"row": name, "tflops": flops / row["median_ms"] / 1e9 if "median_ms" in row else None} | row
        )  # type: ignore[operator]
        print(name, rows[-1].get("median_ms"), rows[-1]["tflops"], row.get("error", ""), flush=True)
    for kernel in options.kernels:
        call = (
            (lambda: cuda.forward(query, key, value, *arguments))
            if kernel == "forward"
            else (lambda: cuda.backward(grad, query, key, value, out, lse, *arguments))
        )
        runs = {str(asdict(tiling)): only(kernel, tiling, call, index) for tiling in SWEEPS[kernel]}
        for name, row in rounds_of(runs, options.rounds).items():
            flops = 2 * pairs * options.head_dim * EXECUTED[kernel]
            found = {"row": kernel, "tiling": name}
            found["executed_tflops"] = flops / row["median_ms"] / 1e9 if "median_ms" in row else None  # type: ignore[operator, assignment]
            rows.append(common | found | row)
            print(kernel, name, row.get("median_ms"), found["executed_tflops"], row.get("error", ""), flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
