"""Where the CPU engine's block-sparse forward spends its time, by operation, at the sizes of attention_cpu.py.

A profiler writes down each operation of a call; of the rounds the quickest is kept. One operation runs after the other,
so their times add up to the call but for what Python takes between them. Products come with their rate.

    python benchmarks/cpu_parts.py        two threads, 8,192 tokens, 4 heads of 128
"""

import argparse
import json
import time
from collections import defaultdict
from pathlib import Path

import attention_cpu
import common
import torch
from torch.profiler import ProfilerActivity, profile

from salad_compile.kernels import block_sparse_attention

RESULTS = Path(__file__).parent / "results" / "cpu_parts.json"
PARTS = {
    "aten::baddbmm": "scores",
    "aten::bmm": "weights times values",
    "aten::softmax": "softmax",
    "aten::_softmax": "softmax",
    "aten::amax": "maxima, for the lse",
    "aten::index_select": "gathering blocks",
    "aten::copy_": "copies: blocks of a head, weights to bf16, results into place",
}
OTHER = "other operations, and Python between them"


def time_parts(settings: attention_cpu.Settings, dtype: torch.dtype) -> dict[str, object]:
    """Milliseconds by part of the quickest round, and the rate of both products in GFLOP/s."""
    query, key, value = attention_cpu.make_inputs(settings, dtype)
    selection = attention_cpu.select(settings, query, key)
    pairs = int(selection[1].sum()) * settings.block**2

    def run() -> None:
        block_sparse_attention(query, key, value, *selection, settings.block, settings.block, settings.head_dim**-0.5)

    run()
    rounds = [measure(run) for _ in range(settings.rounds)]
    parts = min(rounds, key=lambda found: sum(found.values()))
    flop = 2 * pairs * settings.head_dim
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "together_ms": sum(parts.values()),
        "parts_ms": parts,
        "scores_gflops": flop / parts["scores"] / 1e6,
        "values_gflops": flop / parts["weights times values"] / 1e6,
    }


def measure(run: attention_cpu.Run) -> dict[str, float]:
    """One call: part -> milliseconds, together as long as the call."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        start = time.perf_counter()
        run()
        whole = (time.perf_counter() - start) * 1e3
    parts: defaultdict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        if event.key in PARTS:
            parts[PARTS[event.key]] += event.self_cpu_time_total / 1e3
    parts[OTHER] = whole - sum(parts.values())
    return dict(parts)


def main() -> None:
    """Time both dtypes, print, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, two rounds")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the JSON goes (default: %(default)s)")
    options = parser.parse_args()
    tokens, heads, head_dim, block, rounds = (512, 2, 32, 64, 2) if options.quick else (8192, 4, 128, 128, 15)
    settings = attention_cpu.Settings(tokens, heads, head_dim, block, 100, 2, rounds, 1, 0)
    torch.set_num_threads(settings.threads)
    about = {"command": common.command(), "commit": common.commit(), "torch": torch.__version__}
    about |= {"cpu": common.cpu_model(), **vars(settings)}
    rows = [about | time_parts(settings, dtype) for dtype in (torch.float32, torch.bfloat16)]
    for row in rows:
        print(f"{row['dtype']}: {row['together_ms']:.1f} ms; products at {row['scores_gflops']:.0f} and ", end="")
        print(f"{row['values_gflops']:.0f} GFLOP/s")
        for name, ms in sorted(row["parts_ms"].items(), key=lambda part: -part[1]):  # type: ignore[attr-defined]
            print(f"  {ms:7.2f}  {name}")
    options.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
