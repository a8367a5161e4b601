"""The recipe of a fine-tuning on one GPU, through the command line: what --dry-run predicts, and what a run then takes.

    python benchmarks/training_recipe.py                     # Wan2.1-1.3B at 480p, 81 frames, batch 8: 20 steps
    python benchmarks/training_recipe.py --memory-gib 24     # the same where no more memory may be allocated
    python benchmarks/training_recipe.py --quick             # a tiny model on whatever there is: checks that it runs

Weights and data are random, made here, so nothing is downloaded. The dry run compiles with empty caches, the run finds
them filled, as after any dry run. Rows go to results/training_recipe_<gpu>.json, one for each invocation.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import Facts, default_output, describe
from diffusers import WanTransformer3DModel

from salad_compile.common.files import write_at_once
from salad_compile.latents import LatentItem, write_latents
from salad_compile.training import TrainSettings, read_log

WAN = {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960}
LATENT, TEXT = (16, 21, 60, 104), 4096
QUICK_WAN = {"num_attention_heads": 2, "attention_head_dim": 24, "num_layers": 1, "ffn_dim": 32, "text_dim": 16}
QUICK_LATENT, QUICK_TEXT = (16, 3, 16, 16), 16
QUICK = ("--set", "compile=none", "--set", "text_tokens=8", "--set", "precision=fp32", "--convert", "min_tokens=16")
PAPER_STEPS = 1600

# run in a process of its own, with a limit of the allocator where one is asked for
COMMAND = """
import sys, torch
limit = float(sys.argv[1])
if limit:
    torch.cuda.set_per_process_memory_fraction(limit * 2**30 / torch.cuda.get_device_properties(0).total_memory)
from salad_compile.command_line import main
sys.exit(main(sys.argv[2:]))
"""

Command = Callable[[list[str], float], str]


def run_command(words: list[str], gib: float) -> str:
    """What `salad-compile` printed for these words; its progress is shown."""
    print(f"\n$ salad-compile {shlex.join(words)}", flush=True)
    done = subprocess.run([sys.executable, "-c", COMMAND, str(gib), *words], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"it ended with {done.returncode}: {done.stdout}")
    return done.stdout


def make_inputs(folder: Path, *, quick: bool) -> None:
    """`model`, `latents` and `held_out` in a folder: random, of the right shapes."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if quick else torch.bfloat16)
    try:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model: Any = WanTransformer3DModel(**(QUICK_WAN if quick else WAN))  # type: ignore[arg-type]
    finally:
        torch.set_default_dtype(before)
    model.save_pretrained(folder / "model")
    del model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # for the processes that come
    shape, width = (QUICK_LATENT, QUICK_TEXT) if quick else (LATENT, TEXT)
    for name, count in (("latents", 16), ("held_out", 2)):
        items = (
            LatentItem(f"{name}{i}", torch.randn(shape), torch.randn(4 if quick else 40 + 10 * i, width), fps=16.0)
            for i in range(count)
        )
        write_latents(items, folder / name)


def compare(expected: dict[str, Any], log: list[dict[str, Any]]) -> Facts:
    """Prediction and measurement of one run, and how far they are apart."""
    steps = [line for line in log if "loss" in line]
    seconds = [after["seconds"] - line["seconds"] for line, after in itertools.pairwise(steps[1:])]
    whole, step = log[-1]["seconds"], statistics.fmean(seconds)
    once = whole - len(steps) * step
    predicted_once = expected["seconds"] - expected["steps"] * expected["step_seconds"]
    facts = {
        "steps": len(steps),
        "predicted_step_s": expected["step_seconds"],
        "measured_step_s": step,
        "step_spread_s": [min(seconds), max(seconds)],
        "predicted_s": expected["seconds"],
        "measured_s": whole,
        "predicted_once_s": predicted_once,
        "measured_once_s": once,
        "predicted_paper_h": (PAPER_STEPS * expected["step_seconds"] + predicted_once) / 3600,
        "measured_paper_h": (PAPER_STEPS * step + once) / 3600,
        "predicted_peak_bytes": expected["peak_memory"],
        "measured_peak_bytes": max(line["peak_memory"] for line in steps),
        "predicted_disk_bytes": expected["disk"],
        "losses": [line["loss"] for line in steps],
        "expected": expected,
    }
    for name in ("s", "step_s", "paper_h", "peak_bytes"):
        facts[f"{name}_off"] = facts[f"predicted_{name}"] / facts[f"measured_{name}"] - 1
    return facts


def report(facts: Facts) -> str:
    """For the terminal."""
    rows = (
        ("one step, s", "step_s", 1.0),
        ("whole run, s", "s", 1.0),
        ("of it once, s", "once_s", 1.0),
        (f"{PAPER_STEPS} steps, h", "paper_h", 1.0),
        ("peak memory, GiB", "peak_bytes", 2.0**30),
    )
    lines = [f"{'':22}{'predicted':>12}{'measured':>12}{'off by':>10}"]
    for title, name, unit in rows:
        predicted, measured = (facts[f"{kind}_{name}"] / unit for kind in ("predicted", "measured"))
        lines.append(f"{title:22}{predicted:12.3f}{measured:12.3f}{100 * (predicted / measured - 1):+9.1f}%")
    return "\n".join(lines)


def run(options: argparse.Namespace, command: Command = run_command) -> Facts:
    """Make the inputs, predict, run, compare."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="salad_recipe_") as name:
        folder = Path(name)
        make_inputs(folder, quick=options.quick)
        print(f"inputs made after {time.perf_counter() - began:.0f} s", flush=True)
        words = ["train", "--model", str(folder / "model"), "--latents", str(folder / "latents")]
        words += ["--validation", str(folder / "held_out"), "--output", str(folder / "run"), "--json"]
        words += ["--steps", str(options.steps), "--set", f"batch={options.batch}", "--set", "log_every=1"]
        words += ["--set", f"micro_batch={options.micro_batch}", "--set", "validation_points=2"]
        words += [*(QUICK if options.quick else ()), *options.more]
        expected = json.loads(command([*words, "--dry-run"], options.memory_gib))
        print(f"predicted after {time.perf_counter() - began:.0f} s", flush=True)
        command(words, options.memory_gib)
        settings = json.loads((folder / "run" / "training.json").read_text())["settings"]
        facts = compare(expected, read_log(folder / "run"))
    facts |= {
        "settings": settings,
        "memory_gib": options.memory_gib or None,
        "latent": list(QUICK_LATENT if options.quick else LATENT),
    }
    print(f"\n{report(facts)}\nall of it took {time.perf_counter() - began:.0f} s", flush=True)
    return facts


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options; what is not known here goes on to `salad-compile train`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=TrainSettings().batch)
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--memory-gib", type=float, default=0.0, help="what may be allocated; default: all there is")
    parser.add_argument("--quick", action="store_true", help="a tiny model")
    parser.add_argument("--output", type=Path)
    options, options.more = parser.parse_known_args(arguments)
    return options


def main(arguments: list[str] | None = None, command: Command = run_command) -> None:
    """Run the benchmark, print predicted beside measured, add a row to the JSON."""
    options = parse(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    row = {**describe(device), "quick": options.quick, **run(options, command)}
    output = options.output or default_output("training_recipe", device)
    output.parent.mkdir(parents=True, exist_ok=True)
    rows = json.loads(output.read_text()) if output.exists() else []
    with write_at_once(output) as temporary:
        temporary.write_text(json.dumps([*rows, row], indent=1))
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
