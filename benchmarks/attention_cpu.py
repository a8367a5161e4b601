"""Block-sparse attention and the whole SALAD operator against dense attention on the CPU, side by side in one run.

Every round times every row once, in turn, so that drift and neighbours hit all rows alike. Medians and 10%..90% ranges
are printed and written as JSON, with everything needed to run it again. On Linux each round also notes how much CPU
other processes took: on two cores a busy neighbour stalls every parallel region, and block-sparse attention has many.
The second ratio is over the quiet rounds only; all timings are kept.

    python benchmarks/attention_cpu.py            S 8192, H 4, D 128
    python benchmarks/attention_cpu.py --quick    small sizes, two rounds: checks that it runs
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import common
import torch
import torch.nn.functional as F

from salad_compile.common.neighbours import Neighbours
from salad_compile.kernels import (
    block_sparse_attention,
    linear_output,
    linear_state,
    measure_executions,
)

RESULTS = Path(__file__).parent / "results" / "attention_cpu.json"
QUIET = 0.05  # other processes took less than this share of one core
Run = Callable[[], object]


@dataclass(frozen=True)
class Settings:
    """One run of the benchmark."""

    tokens: int
    heads: int
    head_dim: int
    block: int
    density_permille: int
    threads: int
    rounds: int
    slow_every: int  # rounds between two timings of the dense forward + backward rows, which take seconds
    seed: int


@dataclass(frozen=True)
class Row:
    """One timed call, and the row it is compared with."""

    name: str
    dtype: torch.dtype
    baseline: str
    run: Run


def make_inputs(settings: Settings, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """query, key, value as permuted views of (B, S, H, D), as they reach attention in a model."""
    generator = torch.Generator().manual_seed(settings.seed)
    shape = (3, 1, settings.tokens, settings.heads, settings.head_dim)
    query, key, value = torch.randn(shape, generator=generator).to(dtype).transpose(2, 3).unbind(0)
    return query, key, value


def dense_matmuls(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Dense attention as matmul, softmax, matmul, one head at a time; unlike SDPA it reaches the CPU's bf16 units."""
    out = torch.empty_like(query)
    scale = query.shape[-1] ** -0.5
    for h in range(query.shape[1]):
        out[0, h] = torch.softmax((query[0, h] * scale) @ key[0, h].T, dim=-1) @ value[0, h]
    return out


def select(settings: Settings, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Routing at the settings' blocks and density."""
    return common.select(query, key, settings.block, settings.block, settings.density_permille)


def make_rows(settings: Settings, dtype: torch.dtype) -> list[Row]:
    """All rows of one dtype."""
    query, key, value = make_inputs(settings, dtype)
    leaves = tuple(x.detach().requires_grad_() for x in (query, key, value))
    grad = torch.randn_like(query)
    selection = select(settings, query, key)
    scale = settings.head_dim**-0.5
    name = str(dtype).removeprefix("torch.")

    def sparse(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = block_sparse_attention(q, k, v, *selection, settings.block, settings.block, scale)[0]
        return out

    def operator() -> torch.Tensor:
        lut, count = select(settings, query, key)
        out, _ = block_sparse_attention(query, key, value, lut, count, settings.block, settings.block, scale)
        linear: torch.Tensor = linear_output(query, *linear_state(key, value, "relu"), "relu", 1e-6)
        return linear.add_(out)

    def dense_both() -> object:
        return torch.autograd.grad(F.scaled_dot_product_attention(leaves[0], leaves[1], leaves[2]), leaves, grad)

    def sparse_both() -> object:
        return torch.autograd.grad(sparse(leaves[0], leaves[1], leaves[2]), leaves, grad)

    dense, dense_train = f"dense SDPA {name}", f"dense SDPA forward + backward {name}"
    rows = [
        Row(dense, dtype, dense, lambda: F.scaled_dot_product_attention(query, key, value)),
        Row(f"block-sparse forward {name}", dtype, dense, lambda: sparse(query, key, value)),
        Row(f"operator forward {name}", dtype, dense, operator),
        Row(f"routing alone {name}", dtype, dense, lambda: select(settings, query, key)),
        Row(
            f"linear branch alone {name}",
            dtype,
            dense,
            lambda: linear_output(query, *linear_state(key, value, "relu"), "relu", 1e-6),
        ),
        Row(dense_train, dtype, dense_train, dense_both),
        Row(f"block-sparse forward + backward {name}", dtype, dense_train, sparse_both),
    ]
    if dtype == torch.bfloat16:
        rows.insert(1, Row(f"dense matmuls {name}", dtype, dense, lambda: dense_matmuls(query, key, value)))
    return rows


def measured_sparsity(settings: Settings) -> float:
    """1 - computed pairs / all pairs of the selection that is timed."""
    query, key, value = make_inputs(settings, torch.float32)
    with measure_executions() as executions:
        selection = select(settings, query, key)
        block_sparse_attention(query, key, value, *selection, settings.block, settings.block, 1.0)
    return 1 - executions[0].computed_pairs / executions[0].total_pairs


@dataclass
class Timings:
    """Results of the rounds: milliseconds by row and round, and by round the CPU share of other processes."""

    milliseconds: dict[str, dict[int, float]]
    others: dict[int, float]

    def of(self, name: str, *, quiet: bool = False) -> list[float]:
        """The timings of a row, of all rounds or of the quiet ones."""
        return [ms for n, ms in self.milliseconds[name].items() if not quiet or self.others[n] < QUIET]


def time_rows(settings: Settings, rows: list[Row]) -> Timings:
    """Time every row once per round; round 0 warms up and is thrown away."""
    timings = Timings({row.name: {} for row in rows}, {})
    for number in range(settings.rounds + 1):
        neighbours = Neighbours()
        for row in rows:
            if "dense" in row.name and "backward" in row.name and (number - 1) % settings.slow_every:
                continue
            start = time.perf_counter()
            row.run()
            if number:
                timings.milliseconds[row.name][number] = (time.perf_counter() - start) * 1e3
        timings.others[number] = neighbours.cores
    return timings


def describe(settings: Settings, load: float) -> dict[str, object]:
    """Facts that every JSON row repeats, so that it can be read by itself."""
    return {
        "command": common.command(),
        "commit": common.commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": common.cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "load_before": load,
        "measured_sparsity": measured_sparsity(settings),
        **asdict(settings),
    }


def summarise(rows: list[Row], timings: Timings) -> list[dict[str, object]]:
    """Median, range and ratios of every row; a ratio is over the medians of two rows of the same rounds."""
    summary: list[dict[str, object]] = []
    for row in rows:
        times = timings.of(row.name)
        quiet, quiet_baseline = timings.of(row.name, quiet=True), timings.of(row.baseline, quiet=True)
        summary.append(
            {
                "row": row.name,
                "baseline": row.baseline,
                **common.spread(times),
                "speedup": statistics.median(timings.of(row.baseline)) / statistics.median(times),
                "quiet_rounds": len(quiet),
                "quiet_median_ms": statistics.median(quiet) if quiet else None,
                "quiet_speedup": statistics.median(quiet_baseline) / statistics.median(quiet)
                if quiet and quiet_baseline
                else None,
                "timings_ms": list(timings.milliseconds[row.name].values()),
                "others_cpu_share": [timings.others[n] for n in timings.milliseconds[row.name]],
            }
        )
    return summary


def print_table(summary: list[dict[str, object]]) -> None:
    """One line per row."""
    print(f"{'row':44}{'median ms':>10}{'10%..90%':>20}{'ratio':>8}{'quiet ms':>10}{'ratio':>8}{'rounds':>8}")
    for row in summary:
        spread = f"{row['p10_ms']:.1f}..{row['p90_ms']:.1f}"
        quiet = f"{row['quiet_median_ms']:>10.1f}" if row["quiet_median_ms"] else f"{'-':>10}"
        quiet += f"{row['quiet_speedup']:>8.2f}" if row["quiet_speedup"] else f"{'-':>8}"
        counts = f"{row['quiet_rounds']}/{len(list(row['timings_ms']))}"  # type: ignore[call-overload]
        print(f"{row['row']:44}{row['median_ms']:>10.1f}{spread:>20}{row['speedup']:>8.2f}{quiet}{counts:>8}")


def main() -> None:
    """Run the benchmark, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, two rounds")
    parser.add_argument("--rounds", type=int, default=50, help="timed rounds (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the JSON goes (default: %(default)s)")
    options = parser.parse_args()
    sizes = (
        {"tokens": 512, "heads": 2, "head_dim": 32, "block": 64, "rounds": 2, "slow_every": 1}
        if options.quick
        else {"tokens": 8192, "heads": 4, "head_dim": 128, "block": 128, "rounds": options.rounds, "slow_every": 10}
    )
    settings = Settings(density_permille=250 if options.quick else 100, threads=2, seed=0, **sizes)
    torch.set_num_threads(settings.threads)
    load = os.getloadavg()[0]
    about = describe(settings, load)
    rows = [row for dtype in (torch.float32, torch.bfloat16) for row in make_rows(settings, dtype)]
    summary = summarise(rows, time_rows(settings, rows))
    print(f"{about['cpu']}, {settings.threads} threads, torch {torch.__version__}, load before {load:.2f}")
    print(f"S {settings.tokens}, H {settings.heads}, D {settings.head_dim}, blocks of {settings.block}, ", end="")
    print(f"measured sparsity {about['measured_sparsity']:.4f}")
    print_table(summary)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps([about | row for row in summary], indent=1) + "\n")


if __name__ == "__main__":
    main()
