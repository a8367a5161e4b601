"""Everything on one screen: plan, compile dense and SALAD side by side, fine-tune, save, reload, compare.

    python examples/quickstart.py                 # what `make demo` runs
    python examples/quickstart.py --tiny          # seconds, without Inductor; the speed-up means nothing

The model is diffusers' WanTransformer3DModel with random weights: on a GPU with the widths of Wan2.1-1.3B at 480p and
81 frames, on a CPU with fewer heads and layers and a smaller video. Random weights show speed and mechanics, not
quality.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from rich.console import Console
from torch import Tensor

import salad_compile
from salad_compile.common.neighbours import Neighbours, caution
from salad_compile.common.progress import ProgressBar

# a pipe has no width, and tables should not wrap there
console = Console(width=None if sys.stdout.isatty() else 140)


@dataclass(frozen=True)
class Size:
    """Widths of the model and of the video."""

    heads: int
    layers: int
    ffn_dim: int
    latent: tuple[int, int, int]  # frames, height, width before 1x2x2 patches
    text_tokens: int
    dtype: torch.dtype
    timings: int
    steps: int
    config: salad_compile.SaladConfig


# 11,988 tokens on the CPU, in a grid of 9 x 36 x 37: no size has to be divisible by anything. Self-attention has about
# three quarters of the dense FLOPs there, as in Wan2.1-1.3B between 480p and 720p.
_PLAIN = salad_compile.SaladConfig(compensation="none")  # as the seconds in the README were measured
SIZES = {
    "cuda": Size(12, 30, 8960, (21, 60, 104), 512, torch.bfloat16, 10, 10, _PLAIN),
    "cpu": Size(4, 2, 2048, (9, 72, 74), 64, torch.float32, 5, 5, replace(_PLAIN, key_block=128)),
    "tiny": Size(
        2,
        2,
        256,
        (3, 20, 22),
        16,
        torch.float32,
        2,
        3,
        salad_compile.SaladConfig(query_block=32, key_block=32, lora_rank=4, min_tokens=256),
    ),
}


def build(size: Size, device: str) -> WanTransformer3DModel:
    """The same random base model at every call."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=size.heads,
        attention_head_dim=128,
        num_layers=size.layers,
        ffn_dim=size.ffn_dim,
        text_dim=512,
    )
    if size.dtype != torch.float32:  # which it has already; diffusers warns about any cast
        model = model.to(size.dtype)
    return model.to(device).eval()


def make_inputs(size: Size, device: str) -> dict[str, Tensor]:
    """Noise of the video's shape, a timestep and random text embeddings."""
    torch.manual_seed(1)
    return {
        "hidden_states": torch.randn(1, 16, *size.latent, device=device, dtype=size.dtype),
        "timestep": torch.tensor([500], device=device),
        "encoder_hidden_states": torch.randn(1, size.text_tokens, 512, device=device, dtype=size.dtype),
    }


@contextmanager
def step(text: str, total: int = 1) -> Iterator[ProgressBar]:
    """Show the current step with a bar that says what it waits for, and how long it took."""
    start = time.perf_counter()
    if not sys.stderr.isatty():  # no bar there
        console.print(f"{text} ...")
    with ProgressBar(text, total, every=1 if total > 1 else 0) as bar:
        yield bar
    console.print(f"[green]done[/] {text} ({time.perf_counter() - start:.1f} s)")


def seconds(run: Callable[[], object], device: str) -> float:
    """Wall time of one call, the device's work included."""
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compile_both(base: torch.nn.Module, model: torch.nn.Module, *, tiny: bool) -> tuple[Any, Any]:
    """Compile the dense model with stock torch.compile, the converted one with this backend."""
    if tiny:
        options = {"lowering": "aot_eager"}
        return torch.compile(base, backend="aot_eager"), torch.compile(model, backend="salad", options=options)
    return torch.compile(base), torch.compile(model, backend="salad")


def compare_speed(
    dense: Callable[[], object], salad: Callable[[], object], device: str, timings: int, bar: ProgressBar
) -> tuple[list[float], list[float], float]:
    """Interleaved timings of both, after one warm-up call of each, and the cores that others kept busy meanwhile.

    `bar` moves on by 2 + timings.
    """
    bar.advance(0, note="dense compiles")
    dense()
    bar.advance(note="SALAD compiles")
    salad()
    bar.advance(note="timed in turn")
    neighbours = Neighbours()
    pairs = []
    for _ in range(timings):
        pairs.append((seconds(dense, device), seconds(salad, device)))
        bar.advance()
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs], neighbours.cores


def write_row(path: Path, size: Size, device: str, row: dict[str, object]) -> None:
    """Write a measurement with everything needed to repeat it."""
    row |= {
        "command": f"python examples/quickstart.py --device {device} --json {path}",
        "tokens": math.prod(size.latent) // 4,
        "size": {name: str(value) for name, value in vars(size).items()},
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(row, indent=2) + "\n")


def fine_tune(model: torch.nn.Module, inputs: dict[str, Tensor], steps: int, bar: ProgressBar) -> list[float]:
    """A few flow-matching steps on one fixed clip; only branch parameters are trainable."""
    torch.manual_seed(2)
    clip, noise = torch.randn_like(inputs["hidden_states"]), inputs["hidden_states"]
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-3)
    noisy, target = 0.5 * clip + 0.5 * noise, noise - clip
    losses = []
    bar.advance(0, note="the first step compiles")
    for _ in range(steps):
        prediction = model(**{**inputs, "hidden_states": noisy}, return_dict=False)[0]
        loss = torch.nn.functional.mse_loss(prediction.float(), target.float())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        bar.advance(note=f"loss {losses[-1]:.4f}")
    return losses


def main(argv: list[str] | None = None) -> float:
    """Run the demo; returns the measured speed-up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--tiny", action="store_true", help="a size for tests, lowered by aot_eager")
    parser.add_argument(
        "--json", type=Path, help="write the timings to this file, in the format of benchmarks/results/"
    )
    arguments = parser.parse_args(argv)
    device, size = arguments.device, SIZES["tiny" if arguments.tiny else arguments.device]

    with step("building a Wan-class video DiT with random weights"):
        base, inputs = build(size, device), make_inputs(size, device)
    console.print(salad_compile.plan(base, inputs, config=size.config))

    with step("converting a copy of it"):
        model = salad_compile.convert(copy.deepcopy(base), size.config, example_inputs=inputs)

    compiling = step("compiling and timing both", 2 + size.timings)
    with compiling as bar, torch.inference_mode():
        compiled_dense, compiled_salad = compile_both(base, model, tiny=arguments.tiny)
        dense, salad, others = compare_speed(
            lambda: compiled_dense(**inputs), lambda: compiled_salad(**inputs), device, size.timings, bar
        )
    speed_up = statistics.median(dense) / statistics.median(salad)
    for name, times in (("dense, torch.compile", dense), ("SALAD, torch.compile", salad)):
        spread = f"{min(times):.2f} to {max(times):.2f}"
        console.print(f"   {name}: {statistics.median(times):.2f} s a forward (median of {len(times)}, {spread})")
    console.print(f"   [bold]speed-up of the whole forward at {size.config.sparsity:.0%} sparsity: {speed_up:.2f}x[/]")
    if device == "cpu" and (said := caution(others)):
        console.print(f"   {said}")

    if arguments.json:
        write_row(arguments.json, size, device, {"dense": dense, "salad": salad, "speed_up": speed_up})

    with step("asking the backend what it rewrote"):
        explanation = salad_compile.explain(model, **inputs)
    console.print(explanation)
    console.print(salad_compile.summary(model))

    with step(f"fine-tuning for {size.steps} steps", size.steps) as bar:
        losses = fine_tune(compiled_salad, inputs, size.steps, bar)
    console.print(f"   loss {', '.join(f'{loss:.4f}' for loss in losses)}")
    if losses[-1] >= losses[0]:
        raise SystemExit(f"the loss did not fall: {losses}")

    with tempfile.TemporaryDirectory() as folder, step("saving, and loading into a fresh base model"):
        path = salad_compile.save(model, Path(folder) / "salad.safetensors")
        megabytes = path.stat().st_size / 1e6
        fresh = salad_compile.load(build(size, device), path)
    with step("comparing both models' outputs, uncompiled"), torch.no_grad():
        difference = (fresh(**inputs).sample - model(**inputs).sample).abs().max().item()
    console.print(f"   {megabytes:.1f} MB; largest difference of the outputs: {difference:.1e}")
    if difference > 0:
        raise SystemExit("the reloaded model computes a different output")
    return speed_up


if __name__ == "__main__":
    main()
