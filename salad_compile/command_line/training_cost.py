"""What a sample of a fine-tuning takes on this machine: forward, with gradient checkpointing, and backward."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from salad_compile.command_line import model_arguments

if TYPE_CHECKING:
    import torch.nn as nn

# builds a converted model and its inputs; compiles a model, and says how
Build = Callable[[argparse.Namespace, Any], "tuple[nn.Module, nn.Module, Any]"]
Compile = Callable[["nn.Module", str, str], "tuple[Callable[..., Any], str]"]

MOMENTS = 8  # bytes for each trained parameter: two of AdamW's in fp32
MASTER = 4


@dataclass(frozen=True)
class SampleCost:
    """Of one sample.

    Attributes:
        milliseconds: of forward and backward. peak: bytes beyond the weights; None if they are not counted.
        trained: how many parameters are trained.
    """

    milliseconds: float
    peak: int | None
    trained: int

    def hours(self, samples: int) -> float:
        """Of so many samples, one after the other."""
        return samples * self.milliseconds / 3.6e6

    def memory(self, weights: int) -> int | None:
        """Bytes in all, beside so many of the frozen base: with the trained parameters and the optimizer's moments."""
        return None if self.peak is None else weights + self.trained * (MASTER + MOMENTS) + self.peak

    @classmethod
    def scaled(cls, one: SampleCost, more: Mapping[str, SampleCost], counts: Mapping[str, int]) -> SampleCost:
        """Of a model with as many blocks of each kind as `counts` says.

        Args:
            one: of a model with one block of each kind. more: by kind, of one with two of that kind.
        """

        def whole(field: Callable[[SampleCost], float]) -> float:
            return field(one) + sum((counts[name] - 1) * (field(cost) - field(one)) for name, cost in more.items())

        counted = one.peak is not None and all(cost.peak is not None for cost in more.values())
        peak = round(whole(lambda cost: cost.peak or 0)) if counted else None
        return cls(whole(lambda cost: cost.milliseconds), peak, round(whole(lambda cost: cost.trained)))


def measure_sample(arguments: argparse.Namespace, build: Build, compile_model: Compile) -> SampleCost:
    """Time the converted model of the arguments in training, as `train` prepares it: low-rank updates unmerged.

    Args:
        build, compile_model: of `bench`.
    """
    from torch.utils._pytree import tree_leaves

    from salad_compile.command_line.timing import first_call, time_in_turns
    from salad_compile.common.progress import ProgressBar
    from salad_compile.discovery.inputs import normalise_inputs
    from salad_compile.training.tensors import trained_parameters

    device = model_arguments.device_of(arguments)
    _, model, inputs = build(arguments, device)
    trained = list(trained_parameters(model).values())
    for parameter in trained:
        parameter.requires_grad_(True)
        parameter.data = parameter.data.float()
    model.train()
    checkpoint: Any = getattr(model, "enable_gradient_checkpointing", None)
    if checkpoint is not None:
        checkpoint()
    compiled, _ = compile_model(model, arguments.compile, "salad")
    positional, named = normalise_inputs(model, inputs)

    def call() -> None:
        output = tree_leaves(compiled(*positional, **named))[0]
        output.float().square().mean().backward()
        for parameter in trained:
            parameter.grad = None

    first = {"training": first_call(call, device)}
    with ProgressBar("timing training", arguments.rounds) as bar:
        how: dict[str, Any] = {"steps": 1, "rounds": arguments.rounds, "advance": bar.advance}
        times = time_in_turns({"training": call}, first, device, **how)["training"]
    return SampleCost(times.median, times.peak_bytes, sum(parameter.numel() for parameter in trained))
