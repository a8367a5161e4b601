"""Variants of the block-sparse forward beside the shipped one: rows for docs/kernels.md.

    python benchmarks/forward_variants.py --output benchmarks/results/forward_variants_h100.json

Full blocks only (the length is a multiple of every tile), no order, no mask, no check of lists: just the loop.

minimal    the shipped loop without anything around it
lookahead  the scores of the next block are issued before the softmax of this one
pair       two key blocks per step share one softmax step
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from common import Facts, Results, Row, Run, describe, select
from tiles import time_and_keep
from triton.tools.tensor_descriptor import TensorDescriptor

from salad_compile.kernels.block_sparse import triton as host
from salad_compile.kernels.selection import Selection

TOKENS, HEADS, HEAD_DIM, QUERY_BLOCK, KEY_BLOCK = 32_768, 12, 128, 128, 64


@triton.jit
def _tile(descriptor, start, ROWS: tl.constexpr, D: tl.constexpr):
    return descriptor.load([0, tl.program_id(1), start, 0]).reshape([ROWS, D])


@triton.jit
def _begin(query, lut_ptr, slots, M: tl.constexpr, D: tl.constexpr, QB: tl.constexpr):
    tile = tl.program_id(0)
    lut_ptr += (tl.program_id(1) * (tl.num_programs(0) * M // QB) + tile * M // QB) * slots
    lowest = tl.full([M], float("-inf"), tl.float32)
    return _tile(query, tile * M, M, D), lut_ptr, tl.zeros([M, D], tl.float32), tl.zeros([M], tl.float32), lowest


@triton.jit
def _softmax(scores, total, highest, scale):
    new_highest = tl.maximum(highest, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - new_highest[:, None])
    correction = tl.exp2(highest - new_highest)
    return weights, correction, total * correction + tl.sum(weights, 1), new_highest


@triton.jit
def _end(out, acc, total, M: tl.constexpr, D: tl.constexpr):
    found = (acc / total[:, None]).to(tl.bfloat16).reshape([1, 1, M, D])
    out.store([0, tl.program_id(1), tl.program_id(0) * M, 0], found)


@triton.jit(do_not_specialize=["slots"])
def minimal(
    query, key, value, out, lut_ptr, slots, scale, D: tl.constexpr, QB: tl.constexpr, N: tl.constexpr,
    M: tl.constexpr, STAGES: tl.constexpr
):  # fmt: skip
    q, lut_ptr, acc, total, highest = _begin(query, lut_ptr, slots, M, D, QB)
    upcoming = tl.load(lut_ptr) * N
    for i in tl.range(0, slots, num_stages=STAGES):
        start = upcoming
        upcoming = tl.load(lut_ptr + tl.minimum(i + 1, slots - 1)) * N
        scores = tl.dot(q, tl.trans(_tile(key, start, N, D)))
        weights, correction, total, highest = _softmax(scores, total, highest, scale)
        acc = tl.dot(weights.to(tl.bfloat16), _tile(value, start, N, D), acc * correction[:, None])
    _end(out, acc, total, M, D)


@triton.jit(do_not_specialize=["slots"])
def lookahead(
    query, key, value, out, lut_ptr, slots, scale, D: tl.constexpr, QB: tl.constexpr, N: tl.constexpr,
    M: tl.constexpr, STAGES: tl.constexpr
):  # fmt: skip
    q, lut_ptr, acc, total, highest = _begin(query, lut_ptr, slots, M, D, QB)
    start = tl.load(lut_ptr) * N
    scores = tl.dot(q, tl.trans(_tile(key, start, N, D)))
    upcoming = tl.load(lut_ptr + 1) * N
    for i in tl.range(0, slots - 1, num_stages=STAGES):
        next_scores = tl.dot(q, tl.trans(_tile(key, upcoming, N, D)))
        v = _tile(value, start, N, D)
        start = upcoming
        upcoming = tl.load(lut_ptr + tl.minimum(i + 2, slots - 1)) * N
        weights, correction, total, highest = _softmax(scores, total, highest, scale)
        acc = tl.dot(weights.to(tl.bfloat16), v, acc * correction[:, None])
        scores = next_scores
    weights, correction, total, highest = _softmax(scores, total, highest, scale)
    acc = tl.dot(weights.to(tl.bfloat16), _tile(value, start, N, D), acc * correction[:, None])
    _end(out, acc, total, M, D)


@triton.jit(do_not_specialize=["slots"])
def pair(
    query, key, value, out, lut_ptr, slots, scale, D: tl.constexpr, QB: tl.constexpr, N: tl.constexpr,
    M: tl.constexpr, STAGES: tl.constexpr
):  # fmt: skip
    q, lut_ptr, acc, total, highest = _begin(query, lut_ptr, slots, M, D, QB)
    first, second = tl.load(lut_ptr) * N, tl.load(lut_ptr + 1) * N
    for i in tl.range(0, slots // 2, num_stages=STAGES):
        start, other = first, second
        first = tl.load(lut_ptr + tl.minimum(2 * i + 2, slots - 1)) * N
        second = tl.load(lut_ptr + tl.minimum(2 * i + 3, slots - 1)) * N
        scores = tl.dot(q, tl.trans(_tile(key, start, N, D)))
        more = tl.dot(q, tl.trans(_tile(key, other, N, D)))
        new_highest = tl.maximum(highest, tl.max(tl.maximum(scores, more), 1) * scale)
        weights = tl.exp2(scores * scale - new_highest[:, None])
        others = tl.exp2(more * scale - new_highest[:, None])
        correction = tl.exp2(highest - new_highest)
        total = total * correction + tl.sum(weights + others, 1)
        highest = new_highest
        acc = tl.dot(weights.to(tl.bfloat16), _tile(value, start, N, D), acc * correction[:, None])
        acc = tl.dot(others.to(tl.bfloat16), _tile(value, other, N, D), acc)
    _end(out, acc, total, M, D)


# kernel, rows of the query tile, warps, stages
VARIANTS = [
    (minimal, 64, 4, 1),
    (minimal, 64, 4, 2),
    (minimal, 128, 4, 1),
    (minimal, 128, 8, 2),
    (lookahead, 64, 4, 1),
    (lookahead, 64, 4, 2),
    (lookahead, 128, 8, 2),
    (pair, 64, 4, 1),
    (pair, 64, 4, 2),
    (pair, 128, 8, 2),
]


def make_runs() -> tuple[dict[str, Callable[[], torch.Tensor]], int]:
    """The shipped forward and all variants on the same selection, and the number of key blocks that are kept."""
    torch.manual_seed(0)
    shape = (1, TOKENS, HEADS, HEAD_DIM)
    query, key, value, out = (torch.randn(shape, device="cuda").bfloat16().transpose(1, 2) for _ in range(4))
    lut, count = select(query, key, QUERY_BLOCK, KEY_BLOCK, 102)  # 52 of 512: an even number
    scale = HEAD_DIM**-0.5

    def described(x: torch.Tensor, rows: int) -> TensorDescriptor:
        return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows, HEAD_DIM])

    def variant(kernel: Any, rows: int, warps: int, stages: int) -> Callable[[], torch.Tensor]:
        tensors = [described(x, n) for x, n in ((query, rows), (key, KEY_BLOCK), (value, KEY_BLOCK), (out, rows))]
        constants = {"D": HEAD_DIM, "QB": QUERY_BLOCK, "N": KEY_BLOCK, "M": rows, "STAGES": stages}
        options = {"num_warps": warps, "num_stages": stages}

        def run() -> torch.Tensor:
            grid = (TOKENS // rows, HEADS)
            kernel[grid](*tensors, lut, lut.shape[-1], scale * math.log2(math.e), **constants, **options)
            return out

        return run

    def shipped() -> torch.Tensor:
        return host.block_sparse_attention(query, key, value, Selection(lut, count, QUERY_BLOCK, KEY_BLOCK, scale))[0]

    runs = {"shipped": shipped} | {
        f"{kernel.__name__} {rows} x {KEY_BLOCK}, {warps} warps, {stages} stages": variant(kernel, rows, warps, stages)
        for kernel, rows, warps, stages in VARIANTS
    }
    return runs, lut.shape[-1]


def checked(name: str, run: Callable[[], torch.Tensor], expected: torch.Tensor) -> Callable[[Facts], Run]:
    """Preparation of a row: raises if the variant computes a different result."""

    def prepare(_: Facts) -> Run:
        difference = float((run().float() - expected).norm() / expected.norm())
        if not difference < 5e-3:
            raise ValueError(f"{name} is wrong: relative difference {difference}")
        return lambda _: run()

    return prepare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/forward_variants.json"))
    options = parser.parse_args()
    runs, kept = make_runs()
    expected = runs["shipped"]().float()
    flops = 4.0 * HEADS * TOKENS * kept * KEY_BLOCK * HEAD_DIM
    rows = [Row({"row": name, "flops": flops}, checked(name, run, expected)) for name, run in runs.items()]
    facts = {"tokens": TOKENS, "heads": HEADS, "head_dim": HEAD_DIM, "kept": kept}
    time_and_keep([rows], options.rounds, Results(options.output, describe(torch.device("cuda")) | facts))


if __name__ == "__main__":
    main()
