"""Arguments of several commands: the model, the size of its inputs, the settings; and reading them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from salad_compile.command_line.model_source import ModelSource, find_model, import_name, load_model
from salad_compile.command_line.weight_files import stored_dtype
from salad_compile.common.checks import LARGEST_SIZE, is_count
from salad_compile.common.files import read_json
from salad_compile.config import ROPE_PLACEMENTS, SaladConfig
from salad_compile.definition import patterns
from salad_compile.errors import ConfigError, InputsError, ProbeError

if TYPE_CHECKING:
    import torch
    import torch.nn as nn

T = TypeVar("T")

DTYPES = ("bfloat16", "float16", "float32", "float64")
FLAGS = ("sparsity", "pattern", "lora_rank", "rope_placement", "min_tokens")  # settings with an option of their own
# what salad_compile.discovery.inputs makes up: (T, H, W) of the latents, text tokens; and the same in pixels
DEFAULT_LATENT, DEFAULT_TEXT = (21, 60, 104), 512
DEFAULT_PIXELS, VAE_STRIDE = (81, 480, 832), (4, 8, 8)
RANDOM_HINT = "On the command line: --random, which takes the model's memory; is the size one that the model takes?"
INPUTS_HINT = "On the command line: --inputs file.py:function, which returns them."


# --- which model ------------------------------------------------------------------------------------------------------


def add_model(parser: argparse.ArgumentParser, *, weights: bool, option: bool = False) -> None:
    """MODEL and what goes with it. weights: whether the command needs them. option: --model, among other inputs."""
    group = parser.add_argument_group("the model")
    what = (
        "a diffusers checkpoint or pipeline directory, a config.json, module:Class or file.py:Class, or a Hub "
        "repository (owner/name)"
    )
    if option:
        group.add_argument("--model", required=True, metavar="MODEL", help=what)
    else:
        group.add_argument("model", metavar="MODEL", help=what)
    group.add_argument("--component", metavar="NAME", help="of a pipeline: transformer (the default) or transformer_2")
    group.add_argument(
        "--class",
        dest="class_name",
        metavar="CLASS",
        help="the class, where config.json does not say it: of diffusers, or module:Class, whose code runs",
    )
    group.add_argument("--config", metavar="FILE", help="with module:Class: a JSON file of its arguments")
    group.add_argument("--dtype", choices=DTYPES, help="of the parameters; default: as the weights are stored")
    if weights:
        group.add_argument("--weights", metavar="FILE", help="with module:Class: a safetensors file of its state dict")
    purpose = "" if weights else "; takes its memory, for models whose forward reads values or masks"
    group.add_argument("--random", action="store_true", help=f"random weights, the same at every call{purpose}")


def load(arguments: argparse.Namespace, *, meta: bool = False, component: str | None = None) -> nn.Module:
    """The model of the arguments; see :func:`load_model`."""
    return load_model(
        arguments.model,
        dtype=dtype_of(arguments),
        random=arguments.random,
        meta=meta,
        component=component or arguments.component or "transformer",
        class_name=arguments.class_name,
        config=arguments.config,
        weights=getattr(arguments, "weights", None),
    )


def dtype_of(arguments: argparse.Namespace) -> torch.dtype | None:
    """The dtype of --dtype, None if it is not given."""
    import torch

    dtype: torch.dtype | None = None if arguments.dtype is None else getattr(torch, arguments.dtype)
    return dtype


def find_configuration(arguments: argparse.Namespace) -> ModelSource:
    """Where the model comes from, whose weights are not needed."""
    return find_model(
        arguments.model,
        component=arguments.component or "transformer",
        class_name=arguments.class_name,
        config=arguments.config,
        with_weights=False,
    )


def stored_dtype_of(arguments: argparse.Namespace) -> torch.dtype | None:
    """--dtype, or that of the weights that lie beside the model's configuration; None: neither."""
    found = find_configuration(arguments)
    stored = None if found.directory is None else stored_dtype(found.directory)
    return dtype_of(arguments) or stored


def without_weights(
    arguments: argparse.Namespace, act: Callable[[nn.Module, Any], T], *, component: str | None = None
) -> T:
    """`act(model, example inputs)` on a model that takes no memory, or with --random on one that does.

    Raises:
        ProbeError, InputsError: as `act` does, naming the option that helps.
    """
    model = load(arguments, meta=not arguments.random, component=component)
    # discovery knows how to make up the default sizes
    made_up = arguments.inputs is None and latent_size(arguments) == DEFAULT_LATENT
    inputs = None if made_up and arguments.text_tokens == DEFAULT_TEXT else example_inputs(arguments, model)
    try:
        return act(model, inputs)
    except InputsError as error:
        raise InputsError(f"{error} {INPUTS_HINT}") from error
    except ProbeError as error:
        raise error if arguments.random else ProbeError(f"{error} {RANDOM_HINT}") from error


# --- at which size ----------------------------------------------------------------------------------------------------


def add_inputs(parser: argparse.ArgumentParser) -> None:
    """The inputs of the model."""
    group = parser.add_argument_group(
        "its inputs", "made up for diffusers' signatures: 81 frames of 480 x 832 pixels; give others, or your own"
    )
    group.add_argument("--frames", type=positive, metavar="N", help="frames of the video")
    group.add_argument("--height", type=positive, metavar="N", help="pixels")
    group.add_argument("--width", type=positive, metavar="N", help="pixels")
    group.add_argument(
        "--vae-stride",
        type=triple,
        default=VAE_STRIDE,
        metavar="TxHxW",
        help="pixels of one latent, in time, height and width; default 4x8x8, as of Wan 2.1 and HunyuanVideo",
    )
    group.add_argument("--latent", type=triple, metavar="TxHxW", help="the size of the latents instead, 21x60x104")
    group.add_argument("--text-tokens", type=positive, default=DEFAULT_TEXT, metavar="N", help="default 512")
    group.add_argument(
        "--inputs",
        metavar="MODULE:FUNCTION",
        help="or file.py:function: a function without arguments that returns the inputs of one forward, a dict of "
        "keyword or a tuple of positional ones",
    )


def latent_size(arguments: argparse.Namespace) -> tuple[int, int, int]:
    """(T, H, W) of the latents.

    Raises:
        ConfigError: a size is given twice.
    """
    given = (arguments.frames, arguments.height, arguments.width)
    if arguments.latent is not None:
        if any(given):
            raise ConfigError("--latent and --frames, --height, --width both say the size: give one of them.")
        return arguments.latent  # type: ignore[no-any-return]
    frames, height, width = (size or default for size, default in zip(given, DEFAULT_PIXELS, strict=True))
    time, rows, columns = arguments.vae_stride
    return 1 + (frames - 1) // time, height // rows, width // columns  # the first frame has a latent of its own


def example_inputs(arguments: argparse.Namespace, model: nn.Module) -> Any:
    """Inputs of one forward on the model's device: the user's, or made up, all zeros.

    Raises:
        InputsError: none can be made up for this model.
    """
    from torch import Tensor
    from torch.utils._pytree import tree_map_only

    from salad_compile.common.placement import placement
    from salad_compile.discovery.inputs import synthesise_inputs

    device, dtype = placement(model)
    if arguments.inputs is not None:
        given = import_name(arguments.inputs)
        return tree_map_only(Tensor, lambda tensor: tensor.to(device), given() if callable(given) else given)
    try:
        return synthesise_inputs(
            model,
            device=device,
            dtype=dtype,
            latent_size=latent_size(arguments),
            text_tokens=arguments.text_tokens,
        )
    except InputsError as error:
        raise InputsError(f"{error} {INPUTS_HINT}") from error


def noisy_inputs(arguments: argparse.Namespace, model: nn.Module, device: torch.device) -> Any:
    """Inputs for a real forward on `device`: where they were made up, noise in the place of zeros."""
    import torch
    from torch.utils._pytree import tree_map_only

    generator = torch.Generator().manual_seed(0)

    def fill(tensor: torch.Tensor) -> torch.Tensor:
        if arguments.inputs is None and tensor.is_floating_point() and not tensor.any():
            tensor = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
        return tensor.to(device)

    return tree_map_only(torch.Tensor, fill, example_inputs(arguments, model))


# --- with which settings ----------------------------------------------------------------------------------------------


def add_settings(parser: argparse.ArgumentParser) -> None:
    """The fields of SaladConfig, and which sites."""
    group = parser.add_argument_group("the conversion", "fields of SaladConfig; later ones win: file, --set, options")
    group.add_argument("--settings", metavar="FILE", help="a JSON file of fields")
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="any field, its value as JSON or a plain word: --set gate=head --set lowest_sparsity=0.5",
    )
    group.add_argument("--sparsity", type=float, help="share of attention that is left out, 0.9")
    group.add_argument("--pattern", choices=patterns.names(), help="how blocks are chosen")
    group.add_argument("--lora-rank", type=int, metavar="N", help="rank of the low-rank updates, 64; 0 for none")
    group.add_argument("--rope-placement", choices=ROPE_PLACEMENTS, help="where the linear branch sees positions")
    group.add_argument("--min-tokens", type=int, metavar="N", help="attention over fewer tokens stays dense, 8192")
    group.add_argument(
        "--sites",
        action="append",
        metavar="GLOB",
        help='which of the eligible sites, "blocks.1?.*"; a leading ! leaves out; may be given several times',
    )
    group.add_argument("--grid", type=triple, metavar="TxHxW", help="tokens of the video, where they are not found")


def settings_of(arguments: argparse.Namespace) -> SaladConfig:
    """The configuration of the arguments.

    Raises:
        ConfigError: an unknown field or a wrong value. OSError: the file cannot be read.
    """
    values: dict[str, Any] = {}
    if arguments.settings is not None:
        values.update(read_json(Path(arguments.settings)))
    values.update(assignments(arguments.set, "--set"))
    given = {name: getattr(arguments, name) for name in FLAGS}
    return SaladConfig.from_dict({**values, **{name: value for name, value in given.items() if value is not None}})


def add_run(parser: argparse.ArgumentParser) -> None:
    """For commands that run a converted model."""
    group = parser.add_argument_group("the run")
    group.add_argument("--salad", metavar="FILE", help="branches to load: a file, a directory or a Hub repository")
    group.add_argument("--device", metavar="NAME", help="cuda, cuda:1, cpu; default: the GPU if there is one")


def with_branches(arguments: argparse.Namespace, model: nn.Module, inputs: Any) -> nn.Module:
    """The model with the branches of --salad, or with fresh ones as the settings say.

    Raises:
        ConfigError: both are given.
    """
    import salad_compile

    if arguments.salad is not None:
        refuse_settings(arguments)
        return salad_compile.load(model, arguments.salad)
    chosen = {"grid": arguments.grid, "sites": arguments.sites}
    return salad_compile.convert(model, settings_of(arguments), example_inputs=inputs, **chosen)


def refuse_settings(arguments: argparse.Namespace) -> None:
    """Raises ConfigError where a file of branches and settings of a fresh conversion are given together."""
    given = [name for name in (*FLAGS, "settings", "set", "sites") if getattr(arguments, name) not in (None, [])]
    if given:
        names = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ConfigError(f"{arguments.salad} says how the model is converted: leave {names} out.")


def device_of(arguments: argparse.Namespace) -> torch.device:
    """--device, or the GPU if there is one.

    Raises:
        ConfigError: this machine has no such device.
    """
    import torch

    name = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"no device {name!r} here: {str(error).splitlines()[0].rstrip('.')}. `salad-compile doctor` lists them."
        ) from error
    return device


def assignments(given: list[str], option: str) -> dict[str, Any]:
    """The values of an option FIELD=VALUE that may be given several times.

    Raises:
        ConfigError: no FIELD=VALUE.
    """
    values: dict[str, Any] = {}
    for item in given:
        name, equals, text = item.partition("=")
        if not equals:
            raise ConfigError(f"{option} takes FIELD=VALUE, got {item!r}.")
        values[name.replace("-", "_")] = _value(text)
    return values


def _value(text: str) -> Any:
    """The value of a JSON text, or the text itself if it is not JSON; True, False and None are taken as in Python."""
    python = {"True": True, "False": False, "None": None}
    if text in python:
        return python[text]
    try:
        return json.loads(text)
    except ValueError:
        return text


def positive(text: str) -> int:
    """An argument that counts something."""
    value = int(text)
    if not is_count(value, 1, LARGEST_SIZE):
        raise argparse.ArgumentTypeError(f"{value} is not a number of 1 or more, below 2**31")
    return value


def seed(text: str) -> int:
    """An argument for torch's generators."""
    value = int(text)
    if not is_count(value, 0, 2**63 - 1):
        raise argparse.ArgumentTypeError(f"{value} is not a seed, which is 0 or more, below 2**63")
    return value


def triple(text: str) -> tuple[int, int, int]:
    """An argument of three sizes, 21x30x52."""
    try:
        t, h, w = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: write three numbers, 21x30x52") from None
    if not all(is_count(size, 1, LARGEST_SIZE) for size in (t, h, w)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size")
    return t, h, w
