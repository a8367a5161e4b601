"""The pass before the kernel: norm, rotation, features, token order and means of one layer's query and key.

    python benchmarks/prepare.py
    python benchmarks/prepare.py --variants   # other settings of the kernel as well

`salad::prepare_operand` against what Inductor makes of the same lines (Wan's: an RMSNorm over all heads, pairs of
neighbours, fp32 tables). Each row is of both operands. Bytes are the fewest: each operand read once, each result of
the three written once. All rows of a shape are timed in turn under load, see gluon_forward.py. The error is the largest
distance to the definition in fp64, in units of the last place of bf16, on 512 rows of both.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from common import Facts, Results, default_output, describe, spread
from gluon_forward import time_in_turns
from torch import Tensor

from salad_compile.grid.orders import tile_order
from salad_compile.kernels import pool_blocks, prepare_operand
from salad_compile.kernels.preparation import Preparation
from salad_compile.kernels.prepare import reference, triton
from salad_compile.kernels.prepare.tiling import Tiling

SHAPES = ("12x32760", "40x75600")  # heads x tokens: 1.3B at 480p, 14B at 720p
GRIDS = {32760: (21, 30, 52), 75600: (21, 45, 80)}
BLOCKS = (128, 64)  # of query and key
HEAD_DIM, EPS, CHECKED = 128, 1e-6, 512
# name -> what it changes of a tiling
VARIANTS: dict[str, dict[str, int]] = {
    "80 registers": {"registers": 80},
    "64 registers": {"registers": 64},
    "48 registers": {"registers": 48},
    "4 heads, 4 rows": {"heads": 4, "rows": 4},
    "8 rows": {"rows": 8},
    "8 rows, 8 warps": {"rows": 8, "warps": 8},
    "2 heads": {"heads": 2},
    "2 heads, 8 rows": {"heads": 2, "rows": 8},
    "8 warps": {"warps": 8},
    "2 warps": {"warps": 2},
    "1 row, 2 warps, 8 heads": {"rows": 1, "warps": 2, "heads": 8},
}


@dataclasses.dataclass
class Inputs:
    """x (1, H, S, D) of query and key, as projections leave them, and what else they are prepared with."""

    operands: list[Tensor]
    tables: list[Tensor]
    weights: list[Tensor]
    order: Tensor
    inverse: Tensor

    @classmethod
    def draw(cls, heads: int, tokens: int) -> Inputs:
        torch.manual_seed(0)

        def rows() -> Tensor:
            x = torch.randn(1, tokens, heads, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
            return x.transpose(1, 2)

        angle = torch.randn(1, 1, tokens, HEAD_DIM // 2, device="cuda").repeat_interleave(2, -1)
        # as Wan gives them: every second channel of a table
        tables = [angle.cos()[..., 0::2], angle.sin()[..., 1::2]]
        weights = [torch.rand(heads * HEAD_DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
        order = tile_order(GRIDS[tokens], device="cuda")
        return cls([rows(), rows()], tables, weights, order, torch.argsort(order).to(torch.int32))


def as_a_model(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor, order: Tensor) -> list[Tensor]:
    """What Wan and the linear branch write: rotated rows in token order, rows without position, rotated features."""
    heads, head_dim = x.shape[1], x.shape[-1]
    rows = F.rms_norm(x.transpose(1, 2).flatten(2), (heads * head_dim,), weight, EPS).unflatten(2, (heads, head_dim))

    def turn(rows: Tensor) -> Tensor:
        one, two = rows.unflatten(-1, (-1, 2)).unbind(-1)
        out = torch.empty_like(rows)
        out[..., 0::2] = one * cos - two * sin
        out[..., 1::2] = one * sin + two * cos
        return out.type_as(rows).transpose(1, 2)

    rotated = turn(rows).transpose(1, 2).index_select(1, order).transpose(1, 2)
    return [rotated, rows.transpose(1, 2), turn(F.relu(rows))]


def of_inductor(given: Inputs, with_means: bool) -> Callable[[int], object]:
    """Both operands in one graph."""
    cos, sin = (table.transpose(1, 2) for table in given.tables)

    def both(*operands: Tensor) -> list[list[Tensor]]:
        return [as_a_model(x, cos, sin, weight, given.order) for x, weight in zip(operands, given.weights, strict=True)]

    compiled = torch.compile(both, fullgraph=True, dynamic=False)

    def run(_: int) -> object:
        with torch.no_grad():
            results = compiled(*given.operands)
            if with_means:
                return results, [pool_blocks(made[0], block) for made, block in zip(results, BLOCKS, strict=True)]
        return results

    return run


def of_kernel(given: Inputs, with_means: bool, changes: dict[str, int] | None = None) -> Callable[[int], object]:
    """A launch for each operand."""

    def run(_: int) -> list[tuple[Tensor, ...]]:
        return [
            prepare_operand(
                x,
                given.tables,
                *("interleaved", "rms", "width", EPS, "relu", block if with_means else 0),
                *(weight, None, given.order, given.inverse),
            )
            for x, weight, block in zip(given.operands, given.weights, BLOCKS, strict=True)
        ]

    if changes is None:
        return run

    def of(*arguments: Any) -> Tiling:
        return dataclasses.replace(Tiling.of(*arguments), **changes)  # type: ignore[arg-type]

    def patched(number: int) -> object:
        with mock.patch.object(triton, "Tiling", mock.Mock(of=of)):
            return run(number)

    return patched


def error(given: Inputs, made: list[tuple[Tensor, ...]]) -> float:
    """Largest distance to the definition in fp64, in units of the last place of bf16 (of 1 for smaller values)."""
    worst = 0.0
    rows = torch.randperm(given.order.numel(), device="cuda")[:CHECKED]
    for x, weight, results in zip(given.operands, given.weights, made, strict=True):
        exact = reference.prepare_operand(
            x[:, :, rows].double(),
            Preparation(
                [table[:, :, rows].double() for table in given.tables],
                *("interleaved", "rms", "width", EPS, "relu", 0, weight, None, None, None),
            ),
        )
        ours = (results[0][:, :, given.inverse[rows]], results[1][:, :, rows], results[2][:, :, rows])
        for value, expected in zip(ours, exact, strict=False):
            unit = 2.0 ** (expected.abs().clamp(min=1).log2().floor() - 7)
            worst = max(worst, float(((value.double() - expected).abs() / unit).max()))
    return worst


def rows_of(heads: int, tokens: int, options: argparse.Namespace) -> list[Facts]:
    """The timed rows of one shape."""
    given = Inputs.draw(heads, tokens)
    size = given.operands[0].numel() * 2
    table = given.tables[0].numel() * 4
    fewest = 2 * 4 * size + 2 * 2 * table
    source, target = (torch.empty(fewest // 2, device="cuda", dtype=torch.uint8) for _ in range(2))
    calls: dict[str, Callable[[int], object]] = {
        "copy of as many bytes": lambda _: target.copy_(source),
        "inductor": of_inductor(given, False),
        "inductor, means of their own": of_inductor(given, True),
        "kernel": of_kernel(given, False),
        "kernel with means": of_kernel(given, True),
    }
    for name, changes in VARIANTS.items() if options.variants else ():
        calls[f"kernel, {name}"] = of_kernel(given, False, changes)
    errors = {name: error(given, calls[name](0)) for name in ("inductor", "kernel", "kernel with means")}  # type: ignore[arg-type]
    made: Any = calls["kernel with means"](0)
    for (rotated, *_, means), block in zip(made, BLOCKS, strict=True):
        torch.testing.assert_close(means, pool_blocks(rotated, block), rtol=1e-5, atol=1e-5)
    rows = []
    for name, times in time_in_turns(calls, options.rounds).items():
        facts = {"row": name, "heads": heads, "tokens": tokens, "bytes": fewest} | spread(times)
        rows.append(facts | {"gb_per_s": fewest / facts["median_ms"] / 1e6, "error_ulp": errors.get(name)})
        last = f"{errors[name]:6.2f} ulp" if name in errors else ""
        print(f"{name:44s} H{heads} S{tokens} {facts['median_ms']:8.4f} ms {rows[-1]['gb_per_s']:6.0f} GB/s {last}")
    return rows


def main() -> None:
    """Run the benchmark, print the rows, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="heads x tokens, such as 12x32760")
    parser.add_argument("--variants", action="store_true", help="other settings of the kernel as well")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    device = torch.device("cuda")
    facts = {"head_dim": HEAD_DIM, "rounds": options.rounds, "dtype": "bfloat16"}
    results = Results(options.output or default_output("prepare", device), describe(device) | facts)
    for shape in options.shapes:
        heads, tokens = map(int, shape.split("x"))
        results.add(rows_of(heads, tokens, options))


if __name__ == "__main__":
    main()
