"""`salad-compile viz MODEL`: pictures of what a converted model attends to."""

from __future__ import annotations

import argparse

from salad_compile.command_line import model_arguments
from salad_compile.command_line.output import tell

HELP = """\
Runs one forward of a converted model and writes pictures: the blocks that each head computes, the share of the softmax
in them, the gates; and index.html with all of them and the numbers. Give --inputs of a real denoising step: on noise,
which is the default, they show that it works and no more. Without --salad the model is converted afresh.

example:
    salad-compile viz Wan2.1-T2V-1.3B-Diffusers --salad run/salad.safetensors --inputs step.py:inputs --output pictures
    salad-compile viz config.json --random --latent 5x16x16 --min-tokens 256 --output pictures
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, sizes, settings and output directory."""
    model_arguments.add_model(parser, weights=True)
    model_arguments.add_inputs(parser)
    model_arguments.add_settings(parser)
    model_arguments.add_run(parser)
    parser.add_argument("--output", required=True, metavar="DIR", help="a directory; made if it is not there")


def run(arguments: argparse.Namespace) -> int:
    """Draw, and print the path of the page."""
    import salad_compile

    device = model_arguments.device_of(arguments)
    base = model_arguments.load(arguments).to(device)
    inputs = model_arguments.noisy_inputs(arguments, base, device)
    model = model_arguments.with_branches(arguments, base, inputs)
    about = f"{arguments.model}, {_branches(arguments)}. Inputs: {_inputs(arguments)}."
    page = salad_compile.save_pictures(model, inputs, arguments.output, about)
    files = sorted(file.name for file in page.parent.glob("*.png"))
    tell(arguments, f"wrote {page} and {len(files)} pictures", {"page": str(page), "pictures": files})
    return 0


def _branches(arguments: argparse.Namespace) -> str:
    """Whose gates and projections are looked at, for the head of the page."""
    return f"with {arguments.salad}" if arguments.salad else "converted afresh: nothing of it is trained"


def _inputs(arguments: argparse.Namespace) -> str:
    if arguments.inputs:
        return str(arguments.inputs)
    return "made up, of noise: they show that it works, and nothing of what it attends to in a video"
