"""One denoising step and one training step of Wan2.1, dense under torch.compile against SALAD, timed in turn.

    python benchmarks/transformer.py                                 on a GPU; the most important comparisons first
    python benchmarks/transformer.py --models 1.3B-480p --sparsity 0.9 --no-training
    python benchmarks/transformer.py --quick --device cpu --compiler aot_eager     a tiny model: checks that it runs

The models are diffusers' WanTransformer3DModel at full size with random weights: they show speed, not quality.
benchmarks/README.md describes the rows and what they leave out.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import math
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import (
    LOADED,
    Budget,
    Clock,
    Facts,
    Results,
    Row,
    Run,
    clock_for,
    compare_bursts,
    default_output,
    describe,
    free_memory,
    take_both_turns,
    warm_up,
)
from dense_kernels import fastest, preferring, self_attention_on, time_dense
from diffusers import WanTransformer3DModel

import salad_compile
from salad_compile.kernels import measure_executions
from salad_compile.kernels.measure import overall_sparsity
from salad_compile.sites.branch import branches

FORWARD, TRAINING = "denoising step", "training step"
REST_S = 0.3  # before a timing of a burst
# Settings of SaladConfig that the command line can vary; what is timed if nothing is said first.
VARIANTS = {
    "token_order": ("tiles", "flat"),
    "pattern": ("topk", "stswa", "mass8", "mass16", "error8", "error16"),
    "rope_placement": ("auto", "rotate-then-map", "map-then-rotate"),
    "scaling": ("v1", "v2"),
    "gate": ("token", "head", "none"),
    "compensation": ("none", "tail"),
    "prepare_operands": ("auto", "off", "on"),  # of the backend: norm and position in a kernel of ours
    "spare_memory": ("on", "off"),  # of the backend: training computes again what is cheap
}
OF_BACKEND = ("prepare_operands", "spare_memory")
SWITCHES: dict[str, bool | str] = {"auto": "auto", "on": True, "off": False}
WEIGHTS = "all random, gates and projections too; routing on random weights selects close to arbitrary blocks"

Wan = Any  # diffusers' WanTransformer3DModel, which is not typed


@dataclass(frozen=True)
class Model:
    """A size of the model and of the video."""

    name: str
    heads: int
    layers: int
    ffn_dim: int
    latent: tuple[int, int, int]  # frames, height, width before 1 x 2 x 2 patches
    head_dim: int = 128
    text_dim: int = 4096
    text_tokens: int = 512

    @property
    def tokens(self) -> int:
        """Tokens of self-attention."""
        return math.prod(self.latent) // 4

    def quick(self) -> Model:
        """The same at a size for tests."""
        frames, height, width = 3, self.latent[1] // 10 * 2, self.latent[2] // 10 * 2
        small = replace(self, heads=2, layers=1, ffn_dim=128, head_dim=32, text_dim=64, text_tokens=16)
        return replace(small, latent=(frames, height, width))


# Wan2.1 at 81 frames: 480 x 832 and 720 x 1280 pixels
MODELS = (
    Model("1.3B-480p", 12, 30, 8_960, (21, 60, 104)),
    Model("14B-720p", 40, 40, 13_824, (21, 90, 160)),
    Model("1.3B-720p", 12, 30, 8_960, (21, 90, 160)),
)


@dataclass(frozen=True)
class Comparison:
    """Dense and SALAD at some sparsities, all in turn."""

    model: Model
    sparsities: tuple[float, ...]
    step: str
    compile_again: bool = False  # also time the first call once more, with what Inductor and Triton cached


def comparisons(
    models: list[Model], sparsities: list[float], *, training: bool, only: bool = False
) -> Iterator[Comparison]:
    """In the order of importance: what exceeds the budget is left out. only: nothing but training."""
    main, others = tuple(sparsities[:1]), tuple(sparsities[1:])
    if only:
        yield Comparison(models[0], main, TRAINING)
        return
    for number, model in enumerate(models[:2]):
        yield Comparison(model, main, FORWARD, compile_again=number == 0)
    if training:
        yield Comparison(models[0], main, TRAINING)
    for model in models[2:]:
        yield Comparison(model, main, FORWARD)
    if others:
        for model in models:
            yield Comparison(model, others, FORWARD)


# ---------------------------------------------------------------- models


def build(model: Model, device: torch.device, dtype: torch.dtype) -> Wan:
    """A frozen base model with random weights, made on the device in its dtype.

    Modules that diffusers keeps in fp32 when it loads weights (norms, times, modulation) are in fp32 here too.
    """
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            base: Wan = WanTransformer3DModel(  # type: ignore[no-untyped-call]
                num_attention_heads=model.heads,
                attention_head_dim=model.head_dim,
                num_layers=model.layers,
                ffn_dim=model.ffn_dim,
                text_dim=model.text_dim,
            )
    finally:
        torch.set_default_dtype(before)
    for name, parameter in base.named_parameters():
        if set(base._keep_in_fp32_modules).intersection(name.split(".")):
            parameter.data = parameter.data.float()
    return base.requires_grad_(False).eval()


def share(base: Wan) -> Wan:
    """A copy of the module tree with the same tensors, so that dense and SALAD fit into memory together."""
    tensors = [*base.parameters(), *base.buffers()]
    return copy.deepcopy(base, {id(tensor): tensor for tensor in tensors})


def make_inputs(model: Model, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Noise of the video's shape, a timestep and random text embeddings."""
    torch.manual_seed(1)
    return {
        "hidden_states": torch.randn(1, 16, *model.latent, device=device, dtype=dtype),
        "timestep": torch.tensor([500], device=device),
        "encoder_hidden_states": torch.randn(1, model.text_tokens, model.text_dim, device=device, dtype=dtype),
        "return_dict": False,
    }


def convert(
    base: Wan, model: Model, sparsity: float, inputs: dict[str, Any], *, merge: bool, settings: dict[str, str]
) -> Wan:
    """A conversion by salad_compile, with random branches instead of trained ones."""
    rank = 64 if model.tokens > 4096 else 4
    least = min(8192, model.tokens)
    chosen: dict[str, Any] = {name: value for name, value in settings.items() if name not in OF_BACKEND}
    config = salad_compile.SaladConfig(sparsity=sparsity, min_tokens=least, lora_rank=rank, **chosen)
    converted = salad_compile.convert(share(base), config, example_inputs=inputs)
    with torch.no_grad():
        for branch in branches(converted).values():
            for parameter in branch.parameters():
                parameter.normal_(std=0.02)
    if merge:
        salad_compile.merge_lora(converted)
    return converted


# ---------------------------------------------------------------- one comparison


class Stage:
    """The models of one comparison, and its rows."""

    def __init__(self, plan: Comparison, options: argparse.Namespace, clock: Clock) -> None:
        self.plan, self.options, self.clock = plan, options, clock
        self.device = torch.device(options.device)
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.base = build(plan.model, self.device, self.dtype)
        self.inputs = make_inputs(plan.model, self.device, self.dtype)
        self.training = plan.step == TRAINING
        shape = (1, plan.model.tokens, plan.model.heads, plan.model.head_dim)
        self.dense_times = time_dense(shape, self.device, clock, training=self.training)

    def rows(self) -> list[Row]:
        """Dense first, then SALAD at each sparsity, with the settings of the command line and those beside them."""
        none: dict[str, str] = dict.fromkeys(VARIANTS, "")
        rows = [Row(self._facts("dense, torch.compile", "dense", 0.0, none), self._dense)]
        for more in ({}, *self.options.beside):
            settings = {name: getattr(self.options, name) for name in VARIANTS} | more
            told = ", ".join(f"{name}={value}" for name, value in more.items()) or "torch.compile"
            kind = "variant" if more else "salad"  # tables of the others do not take it for the product's default
            facts = [self._facts(f"SALAD, {told}", kind, s, settings) for s in self.plan.sparsities]
            rows += [Row(row, self._salad) for row in facts]
        return rows

    def _facts(self, name: str, kind: str, sparsity: float, settings: dict[str, str]) -> Facts:
        model = self.plan.model
        return {
            "row": name,
            "case": model.name,
            "kind": kind,
            "pass": self.plan.step,
            "sparsity": sparsity,
            "tokens": model.tokens,
            "latent": list(model.latent),
            "layers": model.layers,
            "heads": model.heads,
            "head_dim": model.head_dim,
            "dtype": str(self.dtype).removeprefix("torch."),
            **settings,
            "compiled": f"each block, {self.options.compiler}",
            "weights": WEIGHTS,
            "dense_attention_ms": self.dense_times,
        }

    def _dense(self, facts: Facts) -> Run:
        dense = share(self.base)
        if self.training:
            facts["trains"] = "nothing: the base is frozen, and gradients flow to the latents only"
        compiler = self.options.compiler
        dense.compile_repeated_blocks(**({} if compiler == "inductor" else {"backend": compiler}))
        facts["dense_attention"] = fastest(self.dense_times)
        return self._first(dense, facts, facts["dense_attention"])

    def _salad(self, facts: Facts) -> Run:
        settings = {name: facts[name] for name in VARIANTS}
        how = {"merge": not self.training, "settings": settings}
        converted = convert(self.base, self.plan.model, facts["sparsity"], self.inputs, **how)
        facts["lora"] = "unmerged" if self.training else "merged"
        facts["branch_parameters"] = sum(p.numel() for b in branches(converted).values() for p in b.parameters())
        if self.training:
            facts["trains"] = "gate, projection and LoRA of every layer; gradients flow to the latents too"
        switches = {name: SWITCHES[facts[name]] for name in OF_BACKEND}
        backend = {"lowering": self.options.compiler, **switches}
        converted.compile_repeated_blocks(backend="salad", options=backend)
        with measure_executions() as executions:
            run = self._first(converted, facts)
        facts["measured_sparsity"] = overall_sparsity(executions)
        return run

    def _first(self, model: Wan, facts: Facts, kernel: str = "") -> Run:
        """The call that is timed; the first one, which compiles, is done here.

        Args:
            kernel: of dense self-attention.
        """
        facts["parameter_bytes"] = sum(p.nbytes for p in model.parameters())
        run = self._train(model, kernel) if self.training else self._step(model, kernel)
        start = time.perf_counter()
        run(0)
        self.clock.synchronize()
        facts["first_call_s"] = time.perf_counter() - start
        print(f"  {facts['row']} at {facts['sparsity']}: first call {facts['first_call_s']:.1f} s", flush=True)
        return run

    def _step(self, model: Wan, kernel: str) -> Run:
        def run(_: int) -> object:
            with torch.inference_mode(), preferring(self.dense_times), self_attention_on(kernel):
                return model(**self.inputs)

        return run

    def _train(self, model: Wan, kernel: str) -> Run:
        """Forward with gradient checkpointing, and backward."""
        model.enable_gradient_checkpointing()
        model.train()
        latents = self.inputs["hidden_states"].clone().requires_grad_()
        wanted = [latents, *(p for p in model.parameters() if p.requires_grad)]

        def run(_: int) -> object:
            with preferring(self.dense_times), self_attention_on(kernel):
                out = model(**{**self.inputs, "hidden_states": latents})[0]
                gradients = torch.autograd.grad(out.float().square().mean(), wanted)
            return [*gradients]

        return run

    def compile_again(self, rows: list[Row]) -> None:
        """Forget the compiled graphs, and time each row's first call again: the caches on disk are filled now."""
        torch._dynamo.reset()
        for row in rows:
            if row.run is not None:
                start = time.perf_counter()
                row.run(0)
                self.clock.synchronize()
                row.facts["first_call_cached_s"] = time.perf_counter() - start


def top_kernels(run: Run) -> list[tuple[str, float]]:
    """The kernels that take most of one call, and their milliseconds."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run(0)
        torch.cuda.synchronize()
    events = sorted(profiler.key_averages(), key=lambda e: -e.self_device_time_total)
    return [(event.key[:120], round(event.self_device_time_total / 1e3, 3)) for event in events[:12]]


def note_kernels(rows: list[Row]) -> None:
    """Which kernels ran, to show which dense attention was the baseline. Not for slow steps: it takes one more."""
    for row in rows:
        if row.run is None or row.estimate_ms > 3000:
            continue
        try:
            row.facts["top_kernels"] = top_kernels(row.run)
        except Exception as error:  # a profiler that fails must not lose the row
            row.facts["top_kernels"] = f"{type(error).__name__}: {error}"[:200]


def finish(rows: list[Row]) -> list[Facts]:
    """Ratios to the dense row of the same comparison."""
    finished = [row.to_json() for row in rows]
    dense = next((r for r in finished if r["kind"] == "dense" and "median_ms" in r and not r["error"]), None)
    for row in finished:
        if dense and "median_ms" in row and not row["error"]:
            row["baseline"], row["speedup"] = dense["row"], dense["median_ms"] / row["median_ms"]
            row["dense_attention"] = dense["dense_attention"]
    compare_bursts(finished)
    return finished


def print_table(rows: list[Facts]) -> None:
    """One line per row."""
    for row in rows:
        name = f"  {row['row']} at {row['sparsity']:.2f}"
        if row["error"] or "median_ms" not in row:
            print(f"{name:34}{row['error'] or 'not timed'}")
            continue
        ratio = f"{row['speedup']:.2f}x" if "speedup" in row else ""
        memory = f", {row['working_bytes'] / 2**30:.1f} GiB beyond weights" if row["working_bytes"] else ""
        timings = f"{row['median_ms']:.1f} ms ({row['p10_ms']:.1f} to {row['p90_ms']:.1f}), n {len(row['timings_ms'])}"
        kernel = f", dense attention {row['dense_attention']}" if row.get("dense_attention") else ""
        burst = f", burst {row['burst_median_ms']:.1f} ms" if "burst_median_ms" in row else ""
        burst += f" {row['burst_speedup']:.2f}x" if "burst_speedup" in row else ""
        print(f"{name:34}{timings} {ratio}{burst}{memory}{kernel}", flush=True)


def run_comparison(
    plan: Comparison, options: argparse.Namespace, clock: Clock, budget: Budget, results: Results
) -> None:
    """Build, compile and time one comparison, and keep its rows."""
    print(f"\n{plan.model.name}, {plan.step}, {plan.model.tokens:,} tokens, {plan.model.layers} layers", flush=True)
    about: Facts = {"row": "all rows", "case": plan.model.name, "pass": plan.step, "sparsity": None, "kind": "none"}
    about |= {"sparsities": list(plan.sparsities), "tokens": plan.model.tokens, "timings_ms": []}
    if budget.spent():
        results.add([about | {"error": budget.excuse()}])
        print(f"  {budget.excuse()}", flush=True)
        return
    torch._dynamo.reset()
    try:
        stage = Stage(plan, options, clock)
    except Exception as error:  # for example out of memory: the next model may be smaller
        results.add([about | {"error": f"{type(error).__name__}: {error}"[:600]}])
        print(f"  {type(error).__name__}: {error}", flush=True)
        return
    rows = stage.rows()
    for row in rows:
        warm_up(row, clock, budget)
        results.write(finish(rows))
    if plan.compile_again and not budget.spent():
        stage.compile_again(rows)
    write = lambda: results.write(finish(rows))  # noqa: E731
    take_both_turns(rows, clock, options.rounds, options.row_seconds, write, rest_s=REST_S)
    if options.device == "cuda" and not budget.spent():
        note_kernels(rows)
    finished = finish(rows)
    results.add(finished)
    print_table(finished)
    print(f"  done after {budget.elapsed():.0f} s", flush=True)
    for row in rows:
        row.release()


@contextlib.contextmanager
def fresh_caches() -> Iterator[None]:
    """Empty caches for Inductor and Triton, so that the first comparison's first calls are cold."""
    with tempfile.TemporaryDirectory(prefix="salad_benchmark_", ignore_cleanup_errors=True) as folder:
        for variable, name in (("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton")):
            os.environ[variable] = str(Path(folder) / name)
        yield


def variation(text: str) -> tuple[str, str]:
    """A setting and its value, of `NAME=VALUE`."""
    name, _, value = text.replace("-", "_", text.find("=")).partition("=")
    if value not in VARIANTS.get(name, ()):
        known = "; ".join(f"{name}={'|'.join(choices)}" for name, choices in VARIANTS.items())
        raise argparse.ArgumentTypeError(f"{text!r} is none of {known}")
    return name, value


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [model.name for model in MODELS]
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--models", nargs="+", default=names, choices=names)
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.9, 0.8, 0.95], help="the first matters most")
    for name, choices in VARIANTS.items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, default=choices[0], choices=choices, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, help="timings of a row (default: 10; 2 with --quick)")
    parser.add_argument("--row-seconds", type=float, default=15, help="a slow row takes no longer (3 timings at least)")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--no-training", dest="training", action="store_false", help="denoising steps only")
    parser.add_argument("--training-only", action="store_true", help="the training step only")
    parser.add_argument("--compiler", default="inductor", choices=("inductor", "aot_eager", "eager"))
    parser.add_argument(
        "--beside",
        nargs="+",
        action="append",
        type=variation,
        default=[],
        metavar="NAME=VALUE",
        help="time SALAD with these settings too, in turn with the others; may be given several times",
    )
    parser.add_argument(
        "--budget-seconds", type=float, default=280, help="then no new row starts (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, help="where the JSON goes (default: benchmarks/results/ on a GPU)")
    parser.add_argument("--quick", action="store_true", help="a tiny model, two rounds")
    options = parser.parse_args(arguments)
    options.beside = [dict(pairs) for pairs in options.beside]
    options.rounds = options.rounds or (2 if options.quick else 10)
    return options


def main(arguments: list[str] | None = None) -> None:
    """Run the comparisons, print their tables, keep the rows."""
    options = parse(arguments)
    device, budget = torch.device(options.device), Budget(options.budget_seconds)
    models = [model.quick() if options.quick else model for model in MODELS if model.name in options.models]
    models = [replace(model, layers=options.layers or model.layers) for model in models]
    common = describe(device) | {"quick": options.quick, "seed": 0, "load": LOADED}
    results = Results(options.output or default_output("transformer", device), common)
    print(f"{common['device']}, torch {common['torch']}, Triton {common['triton']}; rows in {results.path}", flush=True)
    clock = clock_for(device)
    with fresh_caches():
        for plan in comparisons(models, options.sparsity, training=options.training, only=options.training_only):
            run_comparison(plan, options, clock, budget, results)
            free_memory()


if __name__ == "__main__":
    main()
