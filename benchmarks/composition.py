"""A denoising step and whole loops of Wan2.1: dense, SALAD, SALAD with fp8 weights, SALAD with cache-dit, few steps.

    python benchmarks/composition.py --model 14B-720p --steps 50 --dense-steps 4       on a GPU
    python benchmarks/composition.py --quick --device cpu --compiler aot_eager         a tiny model: checks that it runs

torchao and cache-dit are used where they can be imported; without them their rows say so. Weights are random: seconds
are those of the real model, but what a cache leaves out, and how far outputs are apart, is not what trained weights
would give. Loops run through diffusers' WanPipeline without text encoder, VAE and guidance.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import Budget, Facts, Results, default_output, describe, free_memory
from common import clock_for as make_clock
from dense_kernels import fastest, preferring, self_attention_on, time_dense
from transformer import MODELS, VARIANTS, Model, Wan, build, convert, make_inputs, share


class Bench:
    """The base, its inputs, and the rows so far."""

    def __init__(self, model: Model, options: argparse.Namespace, results: Results) -> None:
        self.model, self.options, self.results = model, options, results
        self.device = torch.device(options.device)
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.clock, self.budget = make_clock(self.device), Budget(options.budget_seconds)
        self.base = build(model, self.device, self.dtype)
        self.inputs = make_inputs(model, self.device, self.dtype)
        shape = (1, model.tokens, model.heads, model.head_dim)
        self.dense_times = time_dense(shape, self.device, self.clock, training=False)
        self.kernel = fastest(self.dense_times)
        self.outputs: dict[int, torch.Tensor] = {}  # of dense loops
        self.about: Facts = {}  # of the row that is being measured

    def dense(self) -> Wan:
        """Compiled block by block, on the fastest dense attention."""
        model = share(self.base)
        model.compile_repeated_blocks(backend=self.options.compiler)
        return model

    def salad(self, *, fp8: bool = False) -> Wan:
        """Converted, LoRA merged, its base's weights quantised if asked for; not compiled yet."""
        settings = {name: choices[0] for name, choices in VARIANTS.items()}
        model = convert(self.base, self.model, 0.9, self.inputs, merge=True, settings=settings)
        if fp8:
            from torchao.quantization import Float8DynamicActivationFloat8WeightConfig as Dynamic
            from torchao.quantization import Float8WeightOnlyConfig, PerRow, quantize_

            on_gpu = self.device.type == "cuda"
            # else Inductor times variants of each kernel, here and in all rows after this one: minutes
            quiet = {"set_inductor_config": self.options.tune}
            config = Dynamic(granularity=PerRow(), **quiet) if on_gpu else Float8WeightOnlyConfig(**quiet)
            linears = lambda part, name: isinstance(part, torch.nn.Linear) and "blocks." in name  # noqa: E731
            quantize_(model, config, filter_fn=linears)
        return model

    def compile(self, model: Wan) -> Wan:
        """As `compile_pipeline` does."""
        model.compile_repeated_blocks(backend="salad", options={"lowering": self.options.compiler})
        return model

    def step(self, model: Wan, kernel: str = "") -> Facts:
        """Milliseconds of one forward, the first one apart."""
        times = []
        torch._dynamo.utils.counters.clear()
        for _ in range(1 + self.options.timings):
            self.clock.synchronize()
            start = time.perf_counter()
            with torch.inference_mode(), preferring(self.dense_times), self_attention_on(kernel):
                model(**self.inputs)
            self.clock.synchronize()
            times.append(1e3 * (time.perf_counter() - start))
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        about = {"first_call_s": times[0] / 1e3, "graphs": graphs}
        return about | {"median_ms": statistics.median(times[1:]), "timings_ms": times}

    def loop(self, model: Wan, steps: int, *, dense: bool = False, cached: bool = False) -> Facts:
        """Seconds of a whole loop; what compiles, compiles in a loop of one step before, of three with a cache."""
        from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

        parts: dict[str, Any] = {"tokenizer": None, "text_encoder": None, "vae": None}
        pipe = WanPipeline(scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0), transformer=model, **parts)
        pipe.set_progress_bar_config(disable=True)
        ran = []
        model.blocks[-1].register_forward_hook(lambda *_: ran.append(1))
        if cached:
            import cache_dit

            first = min(8, self.model.layers - 1)  # its own default is eight
            # by default it takes the forwards of a WanPipeline in turns for those with and without a prompt
            config = cache_dit.DBCacheConfig(Fn_compute_blocks=first, enable_separate_cfg=False)
            cache_dit.enable_cache(pipe, cache_config=config)
            self.compile(model)
        frames, height, width = self.model.latent
        given = {"height": 8 * height, "width": 8 * width, "num_frames": 1 + 4 * (frames - 1), "guidance_scale": 1.0}
        given |= {"prompt_embeds": self.inputs["encoder_hidden_states"], "output_type": "latent", "return_dict": False}
        seconds, kernel, start = 0.0, self.kernel if dense else "", 0.0

        def tell(_: object, step: int, __: object, kept: dict[str, Any]) -> dict[str, Any]:
            """After each step: how far the loop has come, on the screen and in the file."""
            self.clock.synchronize()
            done = {"steps_done": step + 1, "whole_steps": len(ran), "loop_s": time.perf_counter() - start}
            self.partial(done | {"steps": count, "error": "not ended"})
            if (step + 1) % 5 == 0:
                print(f"    {step + 1} of {count} steps, {len(ran)} whole: {done['loop_s']:.1f} s", flush=True)
            return kept

        for count in (3 if cached else 1, steps):
            ran.clear()
            noise = torch.randn(1, 16, *self.model.latent, generator=torch.Generator().manual_seed(0))
            self.clock.synchronize()
            start = time.perf_counter()
            with preferring(self.dense_times), self_attention_on(kernel):
                out = pipe(
                    latents=noise.to(self.device, torch.float32),
                    num_inference_steps=count,
                    **given,
                    callback_on_step_end=tell,
                )[0]
            self.clock.synchronize()
            seconds = time.perf_counter() - start
        if dense:
            self.outputs[steps] = out.float()
        return {"loop_s": seconds, "steps": steps, "whole_steps": len(ran), "distance": self._distance(out, steps)}

    def _distance(self, out: torch.Tensor, steps: int) -> float | None:
        """To dense, where the dense loop of as many steps was run: norm of the difference over that of dense."""
        dense = self.outputs.get(steps)
        return None if dense is None else float((out.float() - dense).norm() / dense.norm())

    def partial(self, facts: Facts) -> None:
        """Keep what a row has so far, for a run that is cut off."""
        self.results.write_sometimes(lambda: [self.about | facts])

    def row(self, name: str, measure: Callable[[], Facts]) -> None:
        """Measure, print and keep one row; a failure is a row too."""
        about: Facts = {"row": name, "case": self.model.name, "dense_attention": self.kernel, "error": None}
        self.about = dict(about)
        if self.budget.spent():
            about["error"] = self.budget.excuse()
        else:
            try:
                about |= measure()
            except Exception as error:
                about["error"] = f"{type(error).__name__}: {error}"[:400]
        free_memory()
        torch._dynamo.reset()
        shown = {key: value for key, value in about.items() if key not in ("row", "case", "error", "timings_ms")}
        print(f"  {name}: {about['error'] or shown}", flush=True)
        self.results.add([about])


# In the order of worth: what exceeds the budget is left out.
ROWS = ("dense", "salad", "fp8", "whole", "cached", "few")


def run(bench: Bench, options: argparse.Namespace) -> None:
    """The rows that are asked for. Dense loops come before those of SALAD, which are compared with them."""
    few, many = options.dense_steps, options.steps
    measures: dict[str, list[tuple[str, Callable[[], Facts]]]] = {
        "dense": [("dense, one step", lambda: bench.step(bench.dense(), bench.kernel))],
        "salad": [("SALAD, one step", lambda: bench.step(bench.compile(bench.salad())))],
        "fp8": [("SALAD with fp8 weights, one step", lambda: bench.step(bench.compile(bench.salad(fp8=True))))],
        "whole": [(f"dense, {many} steps", lambda: bench.loop(bench.dense(), many, dense=True))],
        "cached": [(f"SALAD with cache-dit, {many} steps", lambda: bench.loop(bench.salad(), many, cached=True))],
        "few": [
            (f"dense, {few} steps", lambda: bench.loop(bench.dense(), few, dense=True)),
            (f"SALAD, {few} steps", lambda: bench.loop(bench.compile(bench.salad()), few)),
        ],
    }
    for kind in ROWS:
        for name, measure in measures[kind] if kind in options.only else ():
            bench.row(name, measure)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [model.name for model in MODELS]
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--model", default="14B-720p", choices=names)
    parser.add_argument("--steps", type=int, default=50, help="of the loop with a cache")
    parser.add_argument("--dense-steps", type=int, default=4, help="of the loop that dense runs too")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[kind for kind in ROWS if kind != "whole"],
        choices=ROWS,
        help="which rows; whole is the long loop dense, which the distance of the cached one needs "
        "(default: all others)",
    )
    parser.add_argument(
        "--tune", action="store_true", help="let torchao switch on Inductor's coordinate descent tuning for fp8"
    )
    parser.add_argument("--timings", type=int, default=3, help="of a single step, after the first one")
    parser.add_argument("--compiler", default="inductor", choices=("inductor", "aot_eager", "eager"))
    parser.add_argument("--budget-seconds", type=float, default=420, help="then no new row starts")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--quick", action="store_true", help="a tiny model")
    options = parser.parse_args(arguments)
    model = next(model for model in MODELS if model.name == options.model)
    model = replace(model.quick(), layers=3) if options.quick else model
    device = torch.device(options.device)
    facts = describe(device) | {"quick": options.quick}
    results = Results(options.output or default_output("composition", device), facts)
    run(Bench(model, options, results), options)


if __name__ == "__main__":
    main()
