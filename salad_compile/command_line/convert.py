"""`salad-compile convert MODEL --output FILE`: the file of a fresh conversion."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from salad_compile.command_line import model_arguments
from salad_compile.command_line.output import tell
from salad_compile.common.reports import plural
from salad_compile.salad_files.location import FILE_NAME

if TYPE_CHECKING:
    import torch
    import torch.nn as nn

HELP = """\
Converts a model and writes the file of its fresh branches: gates and projections that add nothing yet, and LoRA.
`salad-compile train` and salad_compile.load start from it. Weights of the base are neither needed nor written.
A file belongs to one model: of a pipeline with two experts convert each, --component. Exit code 1: nothing can be
converted.

example:
    salad-compile convert Wan2.1-T2V-1.3B-Diffusers --output salad.safetensors --sparsity 0.9 --lora-rank 64
    salad-compile convert Wan2.1-T2V-1.3B-Diffusers --output run/ --set gate=head --sites "blocks.1?.*"
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, sizes, settings and output file."""
    model_arguments.add_model(parser, weights=False)
    model_arguments.add_inputs(parser)
    model_arguments.add_settings(parser)
    group = parser.add_argument_group("the file")
    group.add_argument("--output", required=True, metavar="PATH", help="a file, or a directory for salad.safetensors")
    group.add_argument("--overwrite", action="store_true", help="replace an existing file")
    group.add_argument(
        "--seed", type=model_arguments.seed, default=0, metavar="N", help="of LoRA's random halves; default 0"
    )


def run(arguments: argparse.Namespace) -> int:
    """Convert and save."""
    import torch

    import salad_compile

    target = _target(arguments)
    config = model_arguments.settings_of(arguments)
    dtype = model_arguments.stored_dtype_of(arguments)

    def act(model: nn.Module, inputs: Any) -> nn.Module:
        chosen = {"grid": arguments.grid, "sites": arguments.sites}
        return salad_compile.convert(model, config, example_inputs=inputs, **chosen)

    model = model_arguments.without_weights(arguments, act)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(arguments.seed)
        _materialise(model, dtype)
    file = salad_compile.save(model, target)
    made = salad_compile.summary(model)
    added = made.branch_parameters + made.lora_parameters
    sentence = f"wrote {file}: {plural(len(made.sites), 'site')}, {plural(added, 'parameter')} added"
    tell(arguments, sentence, {"file": str(file), **made.to_dict()})
    return 0


def _target(arguments: argparse.Namespace) -> Path:
    """The file to write.

    Raises:
        FileExistsError: it is there already, and may be the result of a training.
    """
    target = Path(arguments.output)
    if target.is_dir() or arguments.output.endswith("/"):
        target = target / FILE_NAME
    if target.exists() and not arguments.overwrite:
        raise FileExistsError(f"{target} is there already: name another, or replace it with --overwrite")
    return target


def _materialise(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Give branches of a model without memory their initial values; their dtype is that of the stored weights."""
    from salad_compile.sites.branch import branches

    for branch in branches(model).values():
        if branch.low_rank_scale.device.type == "meta":
            branch.to_empty(device="cpu")
        for parameter in branch.parameters():
            parameter.data = parameter.data.to(dtype or parameter.dtype)
        branch.reset_parameters()
