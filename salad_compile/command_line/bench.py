"""`salad-compile bench MODEL`: one denoising step, dense and SALAD in turns."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from salad_compile.command_line import model_arguments
from salad_compile.command_line.output import show
from salad_compile.common.neighbours import Neighbours
from salad_compile.common.progress import ProgressBar
from salad_compile.errors import ConfigError

if TYPE_CHECKING:
    import torch
    import torch.nn as nn

    from salad_compile.command_line.timing import BenchReport

HELP = """\
Times one forward of a model, as a denoising step runs it, dense and as SALAD, in turns on the device at hand, and
prints medians and spread. Both sides are compiled, block by block where the model knows its blocks. Weights may be
random: speed does not depend on them. Without --salad the model is converted afresh. LoRA is merged, as one would for
inference; dense runs on the same weights. --video-steps tells the seconds of a whole video, also of a model that does
not fit this machine, and the hours of a fine-tuning: it times models with one and with four blocks, and scales.

example:
    salad-compile bench Wan2.1-T2V-1.3B-Diffusers/transformer/config.json --random --dtype bfloat16
    salad-compile bench Wan2.1-T2V-14B-Diffusers/transformer/config.json --height 720 --width 1280 --frames 81 \
        --dtype bfloat16 --video-steps 50 --guidance
    salad-compile bench config.json --random --latent 5x16x16 --min-tokens 256 --device cpu --rounds 3
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, sizes, settings, and the number of timings."""
    model_arguments.add_model(parser, weights=True)
    model_arguments.add_inputs(parser)
    model_arguments.add_settings(parser)
    model_arguments.add_run(parser)
    group = parser.add_argument_group("the timing")
    group.add_argument(
        "--steps", type=model_arguments.positive, default=1, metavar="N", help="forwards in one timing, 1"
    )
    group.add_argument("--rounds", type=model_arguments.positive, default=10, metavar="N", help="timings of each, 10")
    group.add_argument(
        "--compile",
        choices=("auto", "blocks", "model", "none"),
        default="auto",
        help="block by block, the whole model, or not at all; auto: blocks where the model knows them, else the model",
    )
    group.add_argument(
        "--video-steps",
        type=model_arguments.positive,
        metavar="N",
        help="tell the seconds of a video of N denoising steps, from models with one and four blocks",
    )
    group.add_argument("--guidance", action="store_true", help="two forwards in each of these steps")
    group.add_argument(
        "--no-training",
        dest="training",
        action="store_false",
        help="with --video-steps: no hours of a fine-tuning",
    )
    group.add_argument("--keep-lora", action="store_true", help="leave the low-rank updates beside the weights")


def run(arguments: argparse.Namespace) -> int:
    """Time and report."""
    if arguments.video_steps is not None:
        from salad_compile.command_line.training_cost import SampleCost, measure_sample
        from salad_compile.command_line.whole_video import time_video

        def sample(small: argparse.Namespace) -> SampleCost:
            return measure_sample(small, _make_pair, _compile)

        show(arguments, time_video(arguments, _measure, sample if arguments.training else None))
        return 0
    if arguments.guidance:
        raise ConfigError("--guidance counts the forwards of a video: give --video-steps, too.")
    show(arguments, _measure(arguments))
    return 0


def _measure(arguments: argparse.Namespace) -> BenchReport:
    """Time the model of the arguments, dense and as SALAD."""
    import salad_compile
    from salad_compile.command_line.timing import BenchReport, first_call, forwards_of, time_in_turns
    from salad_compile.discovery.inputs import normalise_inputs
    from salad_compile.sites.branch import branches

    device = model_arguments.device_of(arguments)
    dense, salad, inputs = _make_pair(arguments, device)
    has_lora = any(branch.lora_roles for branch in branches(salad).values())
    if has_lora and not arguments.keep_lora:
        salad_compile.merge_lora(salad)
    facts: dict[str, Any] = {"lora": "none" if not has_lora else "unmerged" if arguments.keep_lora else "merged"}
    facts |= _facts(arguments, salad, device)
    calls = {}
    for name, model, backend in (("dense", dense, "inductor"), ("SALAD", salad, "salad")):
        compiled, facts["compile"] = _compile(model, arguments.compile, backend)
        calls[name] = _forward(compiled, normalise_inputs(model, inputs))
    first = {"dense": first_call(calls["dense"], device)}
    first["SALAD"], facts["measured_sparsity"] = _measure_sparsity(lambda: first_call(calls["SALAD"], device))
    with ProgressBar("timing", 2 * arguments.rounds) as bar:
        steps = forwards_of(calls.values(), device, arguments.steps, getattr(arguments, "least_ms", 0.0))
        how = {"steps": steps, "rounds": arguments.rounds}
        neighbours = Neighbours()
        times = time_in_turns(calls, first, device, advance=bar.advance, **how)
        if device.type == "cpu":
            facts["other_cores"] = neighbours.cores
    return BenchReport(times["dense"], times["SALAD"], facts | how)


def _make_pair(arguments: argparse.Namespace, device: torch.device) -> tuple[nn.Module, nn.Module, Any]:
    """The dense model, its converted copy over the same weights, and the inputs of one forward."""
    base = model_arguments.load(arguments).to(device).requires_grad_(False)
    inputs = model_arguments.noisy_inputs(arguments, base, device)
    tensors = [*base.parameters(), *base.buffers()]
    twin = copy.deepcopy(base, {id(tensor): tensor for tensor in tensors})
    salad = model_arguments.with_branches(arguments, twin, inputs)
    if arguments.salad is None:
        _fill(salad)
    return base, salad, inputs


def _fill(model: nn.Module) -> None:
    """Noise in fresh branches: products with zeros draw less power, and so run faster, on a GPU."""
    import torch

    from salad_compile.sites.branch import branches

    with torch.no_grad():
        for branch in branches(model).values():
            for parameter in branch.parameters():
                parameter.normal_(std=0.02)


def _compile(model: nn.Module, how: str, backend: str) -> tuple[Callable[..., Any], str]:
    """The model compiled as requested, and a name for that."""
    import torch

    from salad_compile.backend.pipelines import compile_blocks

    if how in ("auto", "blocks") and compile_blocks(model, {}, backend):
        return model, "compiled block by block"
    if how == "blocks":
        raise ConfigError(f"{type(model).__name__} does not know its blocks: --compile model compiles all of it.")
    if how == "none":
        return model, "not compiled"
    return torch.compile(model, backend=backend), "compiled as a whole"


def _forward(model: Callable[..., Any], inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> Callable[[], object]:
    import torch

    positional, named = inputs

    def call() -> object:
        with torch.inference_mode():
            return model(*positional, **named)

    return call


def _measure_sparsity(call: Callable[[], float]) -> tuple[float, float | None]:
    """The result of `call`, and the sparsity measured meanwhile; None if sparse attention never ran."""
    from salad_compile.kernels.measure import measure_executions, overall_sparsity

    with measure_executions() as executions:
        result = call()
    return result, overall_sparsity(executions)


def _facts(arguments: argparse.Namespace, model: nn.Module, device: torch.device) -> dict[str, Any]:
    import torch

    from salad_compile.command_line.timing import device_name
    from salad_compile.common.placement import placement
    from salad_compile.sites.branch import branches

    known = list(branches(model).values())
    return {
        "model": type(model).__name__,
        "weights": "random" if arguments.random else "stored",
        "device": device_name(device),
        "torch": torch.__version__,
        "dtype": str(placement(model)[1]).removeprefix("torch."),
        "sites": len(known),
        "tokens": max(branch.record.tokens for branch in known),
        "sparsity": known[0].config.sparsity,
    }
