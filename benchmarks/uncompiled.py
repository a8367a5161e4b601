"""One uncompiled forward of a tiny Wan: the base model, and the converted one with either placement of the rotation.

The model is so small (two sites, 154 tokens) that arithmetic is next to nothing: what is timed is what conversion adds
to an uncompiled forward in Python and in calls of operators. Every round times every row once, in turn. Wall time and
the thread's CPU time are kept: on a busy machine the second is the one to read.

    python benchmarks/uncompiled.py            300 rounds, one thread
    python benchmarks/uncompiled.py --quick    3 rounds: checks that it runs
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, Facts, Results, describe, spread
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

import salad_compile

BASE = "base"
PLACEMENTS = ("rotate-then-map", "map-then-rotate")
WAN: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 48,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}
SETTINGS: dict[str, Any] = {"sparsity": 0.5, "query_block": 16, "key_block": 16, "lora_rank": 4, "min_tokens": 64}


def make_inputs() -> dict[str, Tensor]:
    """A video of 2 x 7 x 11 = 154 tokens, and 17 tokens of text."""
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(1, 4, 2, 14, 22, generator=generator),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 17, 16, generator=generator),
    }


def make_models() -> dict[str, nn.Module]:
    """Row -> model; all have the same base weights."""
    torch.manual_seed(0)
    base = WanTransformer3DModel(**WAN).eval()
    models: dict[str, nn.Module] = {BASE: base}
    for placement in PLACEMENTS:
        models[placement] = salad_compile.convert(
            copy.deepcopy(base), {**SETTINGS, "rope_placement": placement}, example_inputs=make_inputs()
        ).eval()
    return models


def time_models(models: dict[str, nn.Module], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Row -> clock ("wall", "cpu") -> milliseconds of each round."""
    inputs = make_inputs()
    clocks = {"wall": time.perf_counter, "cpu": time.thread_time}
    times: dict[str, dict[str, list[float]]] = {name: {clock: [] for clock in clocks} for name in models}
    for number in range(-3, rounds):
        for name, model in models.items():
            before = {clock: read() for clock, read in clocks.items()}
            model(**inputs)
            after = {clock: read() for clock, read in clocks.items()}
            if number >= 0:  # the first rounds warm up
                for clock in clocks:
                    times[name][clock].append((after[clock] - before[clock]) * 1e3)
    return times


def summarise(times: dict[str, dict[str, list[float]]]) -> list[Facts]:
    """One JSON row for each model and clock."""
    rows = []
    for name, by_clock in times.items():
        for clock, measured in by_clock.items():
            base = float(spread(times[BASE][clock])["median_ms"])
            summary = spread(measured)
            rows.append(
                {
                    "row": name,
                    "clock": clock,
                    **summary,
                    "times_base": summary["median_ms"] / base,
                    "timings_ms": [round(ms, 4) for ms in measured],
                }
            )
    return rows


def main() -> None:
    """Run the benchmark, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 rounds")
    parser.add_argument("--rounds", type=int, default=300, help="timed rounds (default: %(default)s)")
    output = RESULTS / "uncompiled_cpu.json"
    parser.add_argument("--output", type=Path, default=output, help="where the JSON goes (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    about = describe(torch.device("cpu")) | {"threads": 1, "model": WAN, "settings": SETTINGS, "tokens": 154}
    about["load_before"] = round(os.getloadavg()[0], 2)
    with torch.no_grad():
        rows = summarise(time_models(make_models(), 3 if options.quick else options.rounds))
    print(f"{'row':20}{'clock':>8}{'median ms':>12}{'10%..90%':>18}{'x base':>9}")
    for row in rows:
        bounds = f"{row['p10_ms']:.2f}..{row['p90_ms']:.2f}"
        print(f"{row['row']:20}{row['clock']:>8}{row['median_ms']:>12.2f}{bounds:>18}{row['times_base']:>9.2f}")
    Results(options.output, about).add(rows)


if __name__ == "__main__":
    main()
